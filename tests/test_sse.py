"""Room SSE: the same events however the bytes are cut, and back again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import opendify
from opendify import SSEDecoder, SSEOverflow, encode_comment, encode_event

STREAMS = sorted((Path(__file__).parent / "data" / "streams").glob("*.sse"))
BOM = b"\xef\xbb\xbf"


def decode(pieces: Iterable[bytes]) -> list[str]:
    """All events of a stream that comes in these pieces."""
    decoder = SSEDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


TABLE = [
    pytest.param(b"data: a\n\n", ["a"], id="one"),
    pytest.param(b"data: a\n\ndata: b\n\n", ["a", "b"], id="two"),
    pytest.param(b"data: a\ndata: b\n\n", ["a\nb"], id="two-lines"),
    pytest.param(b"data: a\ndata:\ndata: b\n\n", ["a\n\nb"], id="empty-line-inside"),
    pytest.param(
        b"data: a\n\ndata: b\ndata: c\n\n", ["a", "b\nc"], id="two-lines-later"
    ),
    pytest.param(b"data:a\n\n", ["a"], id="no-space"),
    pytest.param(b"data:  a \n\n", [" a "], id="one-space-goes"),
    pytest.param(b"data:\ta\n\n", ["\ta"], id="tab-stays"),
    pytest.param(b"data: a: b\n\n", ["a: b"], id="colon-in-value"),
    pytest.param(b"data:\n\n", [""], id="empty-data"),
    pytest.param(b"data\n\n", [""], id="no-colon"),
    pytest.param(b"data\ndata\n\n", ["\n"], id="no-colon-twice"),
    pytest.param(b"\n\n\n", [], id="blank-lines"),
    pytest.param(b"", [], id="nothing"),
    pytest.param(b"data: a", [], id="line-without-end"),
    pytest.param(b"data: a\n", [], id="event-without-end"),
    pytest.param(b"data: a\n\ndata: b", ["a"], id="second-without-end"),
    pytest.param(b"event: ping\n\n", [], id="heartbeat"),
    pytest.param(b"event: x\ndata: a\n\n", ["a"], id="typed"),
    pytest.param(b"data: a\nevent: x\n\n", ["a"], id="typed-after"),
    pytest.param(b"event: x\nevent: y\ndata: a\n\n", ["a"], id="last-type"),
    pytest.param(
        b"event: x\ndata: a\n\ndata: b\n\n", ["a", "b"], id="type-ends-with-it"
    ),
    pytest.param(b"event:\ndata: a\n\n", ["a"], id="empty-type"),
    pytest.param(b": hello\n\n", [], id="comment"),
    pytest.param(b":\n\n", [], id="empty-comment"),
    pytest.param(b"data: a\n: hello\ndata: b\n\n", ["a\nb"], id="comment-inside"),
    pytest.param(b"id: 1\ndata: a\n\nid: 2\n\n", ["a"], id="ids"),
    pytest.param(b"retry: 10\ndata: a\n\nretry: 20\n\n", ["a"], id="retry-lines"),
    pytest.param(b"datas: a\nDATA: b\n data: c\n\n", [], id="other-fields"),
    pytest.param(BOM + b"data: a\n\n", ["a"], id="bom"),
    pytest.param(BOM + BOM + b"data: a\n\n", [], id="bom-twice"),
    pytest.param(b"\n" + BOM + b"data: a\n\n", [], id="bom-after-a-blank-line"),
    pytest.param(b"data: a\n\n" + BOM + b"data: b\n\n", ["a"], id="bom-later"),
    pytest.param(b"data: " + BOM + b"a\n\n", ["\ufeffa"], id="bom-in-data"),
    pytest.param("data: 你好 🎉\n\n".encode(), ["你好 🎉"], id="utf-8"),
    pytest.param(
        "data: a\u2028b\x85c\x0bd\x00\n\n".encode(),
        ["a\u2028b\x85c\x0bd\x00"],
        id="no-line-ends",
    ),
    pytest.param(b"data: \xff\xc3\n\n", ["\ufffd\ufffd"], id="not-utf-8"),
]


# ------------------------------------------------------------------------------
# Decoding: the table, cut in every way and with three line ends
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("data", "expected"), TABLE)
def test_stream_decodes_when_fed_byte_by_byte(
    data: bytes, expected: list[str], end: bytes
) -> None:
    assert decode(single_bytes(data.replace(b"\n", end))) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize(("data", "expected"), TABLE)
def test_stream_decodes_when_cut_anywhere(
    data: bytes, expected: list[str], end: bytes
) -> None:
    data = data.replace(b"\n", end)
    for at in range(len(data) + 1):
        assert decode([data[:at], data[at:]]) == expected


@pytest.mark.parametrize(("data", "expected"), TABLE)
def test_what_follows_is_kept_for_later(data: bytes, expected: list[str]) -> None:
    decoder = SSEDecoder()
    first = decoder.feed(data + b"\n\nevent: late\ndata: l")
    later = [decoder.feed(b"ast\n"), decoder.feed(b"\n"), decoder.feed(b"\n")]
    assert later == [[], ["last"], []]
    assert first[: len(expected)] == expected


def test_event_comes_with_its_last_byte_and_not_before() -> None:
    decoder = SSEDecoder()
    data = b"event: x\ndata: a\n\n"
    told = [decoder.feed(byte) for byte in single_bytes(data)]
    assert told == [[]] * (len(data) - 1) + [["a"]]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param([b"data: a\r", b"\n\r", b"\n"], [[], ["a"], []], id="after-cr"),
        pytest.param(
            [b"data: a\r\n\r", b"data: b\r\r"], [["a"], ["b"]], id="cr-then-text"
        ),
        pytest.param([b"data: a\r\r", b"\n\n"], [["a"], []], id="lf-belongs-to-cr"),
        pytest.param(
            [b"data: a\r", b"", b"\ndata: b\n\n"], [[], [], ["a\nb"]], id="empty-read"
        ),
        pytest.param([b"data: a\n\r\n"], [["a"]], id="lf-then-crlf"),
        pytest.param(
            [b"data: a\n\rdata: b\r\n\ndata: c\r\r\n"],
            [["a", "b", "c"]],
            id="all-kinds",
        ),
    ],
)
def test_line_ends_are_told_apart_when_cut(
    pieces: list[bytes], expected: list[list[str]]
) -> None:
    decoder = SSEDecoder()
    assert [decoder.feed(piece) for piece in pieces] == expected


def test_character_may_be_cut_anywhere() -> None:
    data = "data: 你🎉é\n\n".encode()
    for at in range(len(data) + 1):
        assert decode([data[:at], data[at:]]) == ["你🎉é"]


# ------------------------------------------------------------------------------
# Recorded streams
# ------------------------------------------------------------------------------


def stream_id(path: Path) -> str:
    return path.stem


def test_there_are_recorded_streams() -> None:
    assert len(STREAMS) > 30


def blocks(data: bytes, end: bytes) -> list[bytes]:
    """The stream cut behind its blank lines."""
    *complete, rest = data.split(end + end)
    return [*(block + end + end for block in complete), rest]


@pytest.mark.parametrize("path", STREAMS, ids=stream_id)
def test_recorded_stream_is_the_same_however_it_is_cut(path: Path) -> None:
    """With each kind of line ends; with the longest, at each byte of each block."""
    data = path.read_bytes().replace(b"\r\n", b"\n")
    whole = SSEDecoder().feed(data)
    assert whole
    for end in (b"\n", b"\r\n", b"\r"):
        other = data.replace(b"\n", end)
        assert SSEDecoder().feed(other) == whole
        assert decode(single_bytes(other)) == whole
        assert decode(blocks(other, end)) == whole
    for block in blocks(data.replace(b"\n", b"\r\n"), b"\r\n"):
        expected = SSEDecoder().feed(block)
        for at in range(len(block)):
            assert decode([block[:at], block[at:]]) == expected


# ------------------------------------------------------------------------------
# Size
# ------------------------------------------------------------------------------


def test_huge_line_passes() -> None:
    size = 2 * 1024 * 1024
    line = b"data: " + b"x" * size + b"\n\n"
    pieces = [line[at : at + 65536] for at in range(0, len(line), 65536)]
    assert [len(event) for event in decode(pieces)] == [size]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"data: %b", id="data"),
        pytest.param(b": %b", id="comment"),
        pytest.param(b"%b: x", id="name"),
    ],
)
def test_event_over_the_limit_is_refused(
    monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    monkeypatch.setattr(opendify, "MAX_EVENT_BYTES", 1 << 20)
    decoder = SSEDecoder()
    with pytest.raises(SSEOverflow, match=r"^an event of more than 1 MiB$"):
        for _ in range(40):
            decoder.feed(line % (b"x" * 65536))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_many_lines_over_the_limit_are_refused(
    monkeypatch: pytest.MonkeyPatch, end: bytes
) -> None:
    monkeypatch.setattr(opendify, "MAX_EVENT_BYTES", 1000)
    decoder = SSEDecoder()
    with pytest.raises(SSEOverflow):
        for _ in range(200):
            decoder.feed(b"data: x" + end)


@pytest.mark.parametrize(
    ("block", "count"),
    [
        pytest.param(b"data: " + b"x" * 92 + b"\n\n", 1, id="events"),
        pytest.param(b"event: ping\n\n", 0, id="heartbeats"),
        pytest.param(b": keep-alive\n\n", 0, id="comments"),
        pytest.param(b"id: 1\n\n", 0, id="ids"),
        pytest.param(b"\n", 0, id="blank-lines"),
    ],
)
def test_limit_is_for_one_event_not_for_the_stream(
    monkeypatch: pytest.MonkeyPatch, block: bytes, count: int
) -> None:
    monkeypatch.setattr(opendify, "MAX_EVENT_BYTES", 100)
    decoder = SSEDecoder()
    assert sum(len(decoder.feed(block)) for _ in range(200)) == 200 * count


def test_event_at_the_limit_passes_and_one_byte_more_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(opendify, "MAX_EVENT_BYTES", 100)
    assert SSEDecoder().feed(b"data: " + b"x" * 94) == []
    with pytest.raises(SSEOverflow):
        SSEDecoder().feed(b"data: " + b"x" * 95)


# ------------------------------------------------------------------------------
# Encoding
# ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        pytest.param(encode_event(b"{}"), b"data: {}\n\n", id="data"),
        pytest.param(encode_event(b""), b"data: \n\n", id="empty"),
        pytest.param(encode_event(b"{}", "x"), b"event: x\ndata: {}\n\n", id="typed"),
        pytest.param(encode_comment("keep-alive"), b": keep-alive\n\n", id="comment"),
    ],
)
def test_encoded_bytes_are_exact(encoded: bytes, expected: bytes) -> None:
    assert encoded == expected


ONE_LINE = st.text(
    st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=40
)
TYPES = ONE_LINE.filter(lambda text: not text.startswith("\ufeff"))
SOME_EVENTS = st.lists(st.tuples(ONE_LINE, TYPES), max_size=5)


@given(SOME_EVENTS, st.booleans(), st.lists(st.integers(0, 400), max_size=5))
def test_decoding_undoes_encoding(
    pairs: list[tuple[str, str]], with_comments: bool, cuts: list[int]
) -> None:
    stream = b"".join(
        encode_event(data.encode(), kind) + encode_comment(data) * with_comments
        for data, kind in pairs
    )
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[start:end] for start, end in zip(places, places[1:])]
    assert decode(pieces) == [data for data, _ in pairs]


LINES = [b"\r", b"\n", b"data: ", b"data: a\n", b"data: b\n\n"]


@given(st.lists(st.binary(max_size=40) | st.sampled_from(LINES)))
def test_any_bytes_decode_alike_however_they_are_cut(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    whole = SSEDecoder().feed(data)
    assert decode(pieces) == whole
    assert decode(single_bytes(data)) == whole
