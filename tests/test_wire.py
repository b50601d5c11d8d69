"""Room Wire: framing with h11 as the oracle, hostile heads, replies, deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Callable, Optional, cast

import h11
import pytest
from clock import VirtualClockLoop, now
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from work import at_most

from opendify import (
    MAX_EXTENSION_BYTES,
    MAX_FIELDS,
    MAX_HEAD_BYTES,
    READ_BUFFER_BYTES,
    WRITE_TIMEOUT_S,
    BodyDecoder,
    ConnectionBroken,
    HeadTooLarge,
    MalformedHTTP,
    ProxyError,
    Reply,
    Request,
    Wire,
    body_decoder,
    check_line_ends,
    encode_head,
    ends_connection,
    parse_request_head,
    read_body,
    read_fields,
    read_head,
    skip_empty_lines,
)

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"


class PieceWire(Wire):
    """Gives the pieces as they are, one a read, then the end."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        super().__init__()
        self.pieces = list(filter(None, pieces))

    async def wait_for_data(self) -> bool:
        if self.unread:
            return True
        if self.pieces:
            self.data_received(self.pieces.pop(0))
        else:
            self.eof_received()
        return await super().wait_for_data()


class MemoryTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True


@contextlib.asynccontextmanager
async def memory_wire(*pieces: bytes) -> AsyncIterator[tuple[Wire, MemoryTransport]]:
    """A wire that reads the pieces one by one, then the peer's end."""
    wire, transport = PieceWire(pieces), MemoryTransport()
    wire.connection_made(transport)
    try:
        yield wire, transport
    finally:
        wire.close()


@contextlib.asynccontextmanager
async def wired() -> AsyncIterator[tuple[Wire, socket.socket]]:
    """A wire on one end of a real connection, and the other end."""
    near, far = socket.socketpair()
    far.setblocking(False)
    loop: Any = asyncio.get_running_loop()
    _, wire = await loop.connect_accepted_socket(Wire, near)
    try:
        yield wire, far
    finally:
        far.close()
        wire.close()


async def some(wire: Wire) -> bytes:
    """Some bytes, b"" at the end."""
    await wire.wait_for_data()
    data, wire.unread = wire.unread, b""
    return data


def cut(data: bytes, at: Iterable[int]) -> list[bytes]:
    """The data in pieces, cut at these places."""
    places = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    pieces = [data[a:b] for a, b in zip(places, places[1:])]
    return [piece for piece in pieces if piece]


def bytewise(data: bytes) -> list[bytes]:
    return [data[n : n + 1] for n in range(len(data))]


# ------------------------------------------------------------------------------
# Bodies
# ------------------------------------------------------------------------------

Outcome = Optional[tuple[bytes, bytes]]  # (body, what follows it); None: incomplete


def feed(decoder: BodyDecoder, pieces: Sequence[bytes]) -> Outcome:
    """What a decoder makes of the pieces."""
    body = b""
    for number, piece in enumerate(pieces):
        body += decoder.feed(piece)
        if decoder.failure:
            raise MalformedHTTP(decoder.failure)
        if decoder.is_complete:
            return body, decoder.rest + b"".join(pieces[number + 1 :])
    return None


def judge(framed: bytes) -> Outcome:
    """What h11 makes of a chunked body; raises RemoteProtocolError."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + framed
    )
    body = b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return body, connection.trailing_data[0]
        elif event is h11.NEED_DATA:
            return None


TOKEN = st.text("abcXYZ019!#$%&'*+-.^_`|~", min_size=1, max_size=9).map(str.encode)
VALUE = st.text('abc XYZ\t;=,"\u00e9', max_size=12).map(lambda t: t.encode("latin-1"))
EXTENSION = st.sampled_from([b"", b" ", b"\t ", b";a", b"; a = b", b';a="q w";b', b";"])
CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@st.composite
def chunked(draw: st.DrawFn) -> list[bytes]:
    """Any body in any chunks, with extensions, odd spellings and trailers."""
    framed: list[bytes] = []
    for chunk in draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6)):
        size = draw(st.sampled_from(["%x", "%X", "%04x"])) % len(chunk)
        framed.append(size.encode() + draw(EXTENSION) + b"\r\n" + chunk + b"\r\n")
    end = draw(st.sampled_from([b"0", b"000"])) + draw(EXTENSION) + b"\r\n"
    for name, value in draw(st.lists(st.tuples(TOKEN, VALUE), max_size=3)):
        end += name + b": " + value.strip() + b"\r\n"
    return [*framed, end + b"\r\n"]


@given(chunked(), st.binary(max_size=20), CUTS)
def test_chunked_body_is_what_h11_says_however_it_is_cut(
    chunks: list[bytes], rest: bytes, places: list[int]
) -> None:
    framed = b"".join(chunks)
    expected = judge(framed + rest)
    assert expected is not None
    assert feed(BodyDecoder(None), [*chunks, rest]) == expected
    assert feed(BodyDecoder(None), [framed + rest]) == expected
    assert feed(BodyDecoder(None), cut(framed + rest, places)) == expected
    assert feed(BodyDecoder(None), bytewise(framed + rest)) == expected


@given(chunked())
def test_chunked_body_is_not_complete_before_its_last_byte(chunks: list[bytes]) -> None:
    decoder = BodyDecoder(None)
    for piece in bytewise(b"".join(chunks))[:-1]:
        decoder.feed(piece)
        assert not decoder.is_complete
    with pytest.raises(ConnectionBroken):
        decoder.feed_eof()


@pytest.mark.parametrize(
    ("read", "body", "more"),
    [
        pytest.param(b"2\r\nbc\r\n", b"bc", b"", id="one"),
        pytest.param(b"2\r\nbc\r\n1\r\nd\r\n", b"bcd", b"", id="two"),
        pytest.param(b"02\r\nbc\r\n", b"bc", b"", id="zero-before"),
        pytest.param(b"2;x\r\nbc\r\n", b"bc", b"", id="extension"),
        pytest.param(b"4\r\nb\r\nc\r\n", b"b\r\nc", b"", id="line-end-inside"),
        pytest.param(b"3\r\n2\r\n\r\n", b"2\r\n", b"", id="line-end-at-the-end"),
        pytest.param(b"2\r\nbc", b"bc", b"\r\n", id="without-its-end"),
        pytest.param(b"2\r\nbc\r\n1", b"bc", b"\r\nd\r\n", id="size"),
        pytest.param(b"2\r\nbc\r\n1\r\n", b"bc", b"d\r\n", id="size-line"),
        pytest.param(b"2\r\nbc\r\n2\r\nd", b"bcd", b"e\r\n", id="half-a-chunk"),
        pytest.param(b"3\r\nbc\r\n", b"bc\r", b"", id="size-too-large"),
        pytest.param(b"1\r\nbc\r\n", b"b", b"", id="size-too-small"),
        pytest.param(b"2\r\nbc\r\nx\r\nd\r\n", b"bc", b"", id="no-size"),
        pytest.param(b"2\r\nbc\r\n0\r\n\r\n", b"bc", b"", id="one-and-the-end"),
        pytest.param(b"0\r\n\r\n", b"", b"", id="the-end"),
    ],
)
def test_read_behind_a_chunk(read: bytes, body: bytes, more: bytes) -> None:
    """A read is taken as chunks that came whole, if it is nothing else."""
    framed = b"1\r\na\r\n" + read + more + b"0\r\n\r\n"
    decoder = BodyDecoder(None)
    assert decoder.feed(framed[:6]) + decoder.feed(read) == b"a" + body
    rest = [] if decoder.is_complete else [more, b"0\r\n\r\n"]
    try:
        expected = judge(framed)
    except h11.RemoteProtocolError:
        with pytest.raises(MalformedHTTP):
            feed(decoder, [b"", *rest])
        return
    assert expected is not None
    assert decoder.is_complete == (judge(framed[:6] + read) is not None)
    outcome = feed(decoder, rest) or (b"", b"")
    assert b"a" + body + outcome[0] == expected[0]
    assert decoder.is_complete


WRONG_BYTES = st.sampled_from([bytes([n]) for n in b"\r\n \t;:-+_xgG0fF\x00\xff"])


@given(
    st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 99), WRONG_BYTES), min_size=1, max_size=3),
    st.booleans(),
    CUTS,
)
def test_damaged_chunks_are_refused_where_h11_refuses_or_earlier(
    chunks: list[bytes],
    damage: list[tuple[int, bytes]],
    inserts: bool,
    places: list[int],
) -> None:
    rows = [b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]
    ends = list(itertools.accumulate(map(len, rows)))
    framed = b"".join(rows) + b"0\r\n\r\n"
    for place, wrong in damage:
        at = place % len(framed)
        framed = framed[:at] + wrong + framed[at + (not inserts) :]
    assume(b" ;" not in framed and b"\t;" not in framed)  # RFC 9112 has it, h11 not
    try:
        expected = judge(framed)
    except h11.RemoteProtocolError:
        for pieces in ([framed], cut(framed, ends)):
            with pytest.raises(MalformedHTTP):
                feed(BodyDecoder(None), pieces)
        return
    for pieces in (cut(framed, places), cut(framed, ends)):
        with contextlib.suppress(MalformedHTTP):  # stricter
            assert feed(BodyDecoder(None), pieces) == expected


@pytest.mark.parametrize(
    "framed",
    [
        pytest.param(b"\r\n", id="no-size"),
        pytest.param(b";ext\r\n", id="extension-alone"),
        pytest.param(b"-1\r\n", id="negative"),
        pytest.param(b"+1\r\na\r\n", id="plus"),
        pytest.param(b"0x1\r\na\r\n", id="0x"),
        pytest.param(b" 1\r\na\r\n", id="space-before"),
        pytest.param(b"1_0\r\n", id="underscore"),
        pytest.param(b"g\r\n", id="no-hex"),
        pytest.param(b"\xb9\r\na\r\n", id="superscript"),
        pytest.param(b"1\na\r\n", id="bare-lf"),
        pytest.param(b"1\ra\r\n", id="bare-cr"),
        pytest.param(b"1;a\rb\r\na\r\n", id="cr-in-extension"),
        pytest.param(b"1;a\nb\r\na\r\n", id="lf-in-extension"),
        pytest.param(b"1\r\nab\r\n", id="data-too-long"),
        pytest.param(b"1\r\na\n0\r\n\r\n", id="lf-behind-data"),
        pytest.param(b"1\r\na0\r\n\r\n", id="nothing-behind-data"),
        pytest.param(b"f" * 16 + b"\r\n", id="size-too-large"),
        pytest.param(b"0\r\nnot a field\r\n\r\n", id="trailer-without-colon"),
        pytest.param(b"0\r\n: v\r\n\r\n", id="trailer-without-name"),
        pytest.param(b"0\r\na : v\r\n\r\n", id="trailer-space-before-colon"),
        pytest.param(b"0\r\na: v\r\n folded\r\n\r\n", id="trailer-folded"),
        pytest.param(b"0\r\na: v\nb: w\r\n\r\n", id="trailer-bare-lf"),
        pytest.param(b"0\r\na: v\rb: w\r\n\r\n", id="trailer-bare-cr"),
        pytest.param(b"0\r\na: v\n\n", id="trailers-that-never-end"),
    ],
)
@pytest.mark.parametrize("split", [cut, lambda data, _: bytewise(data)])
def test_malformed_chunk_is_refused(
    framed: bytes, split: Callable[[bytes, Iterable[int]], list[bytes]]
) -> None:
    with pytest.raises(MalformedHTTP):
        feed(BodyDecoder(None), split(framed, ()))


@pytest.mark.parametrize(
    ("before", "after", "most"),
    [
        pytest.param(
            *(b"1;", b"\r\na\r\n0\r\n\r\n", MAX_EXTENSION_BYTES), id="first-extension"
        ),
        pytest.param(
            *(b"1\r\na\r\n0;", b"\r\n\r\n", MAX_EXTENSION_BYTES), id="last-extension"
        ),
        pytest.param(b"0\r\na:", b"\r\n\r\n", MAX_HEAD_BYTES, id="trailer"),
    ],
)
@pytest.mark.parametrize("pieces", [1, 9, 4000])
def test_what_nobody_needs_is_bounded_however_it_is_cut(
    before: bytes, after: bytes, most: int, pieces: int
) -> None:
    for size, is_fine in ((most - 99, True), (most + 99, False)):
        framed = before + b"x" * size + after
        step = max(1, len(framed) // pieces)
        parts = [framed[n : n + step] for n in range(0, len(framed), step)]
        if is_fine:
            outcome = feed(BodyDecoder(None), parts)
            assert outcome is not None
            assert outcome[1] == b""
        else:
            with pytest.raises(MalformedHTTP):
                feed(BodyDecoder(None), parts)


async def test_what_came_before_malformed_framing_is_handed_out() -> None:
    decoder = BodyDecoder(None)
    async with memory_wire(b"2\r\nab\r\n1\r\nc\r\nno size") as (wire, _):
        assert await read_body(wire, decoder) == b"abc"
        with pytest.raises(MalformedHTTP):
            await read_body(wire, decoder)


def test_what_follows_the_last_chunk_is_no_chunk() -> None:
    """Though it looks like one: it would be another message's in this one's body."""
    framed, rest = b"3\r\nabc\r\n0\r\n\r\n", b"2\r\nhi\r\n"
    assert feed(BodyDecoder(None), [framed + rest]) == (b"abc", rest)


def test_space_before_an_extension_is_fine() -> None:
    """h11 refuses it, RFC 9112, section 7.1.1, wants it to be read."""
    framed = b"1 \t; a = b\r\nx\r\n0 ;a\r\n\r\n"
    for pieces in ([framed], bytewise(framed)):
        assert feed(BodyDecoder(None), pieces) == (b"x", b"")


def test_trailers_are_bounded_together() -> None:
    trailers = b"".join(b"a%d: %b\r\n" % (n, b"x" * 999) for n in range(40))
    with pytest.raises(MalformedHTTP):
        feed(BodyDecoder(None), cut(b"0\r\n" + trailers + b"\r\n", range(0, 40000, 7)))


@given(st.binary(max_size=60), st.binary(max_size=20), CUTS)
def test_body_with_a_length_ends_there(
    body: bytes, rest: bytes, places: list[int]
) -> None:
    if not body:
        assert BodyDecoder(0).is_complete
        return
    for pieces in ([body + rest], bytewise(body + rest), cut(body + rest, places)):
        assert feed(BodyDecoder(len(body)), pieces) == (body, rest)
    decoder = BodyDecoder(len(body) + 1)
    assert feed(decoder, [body]) is None
    with pytest.raises(ConnectionBroken):
        decoder.feed_eof()


def test_body_until_the_end_takes_everything() -> None:
    decoder = BodyDecoder(-1)
    assert [decoder.feed(b"ab"), decoder.feed(b"\r\n0\r\n\r\n")] == [
        b"ab",
        b"\r\n0\r\n\r\n",
    ]
    assert not decoder.is_complete
    decoder.feed_eof()
    assert decoder.is_complete


@pytest.mark.parametrize(
    ("headers", "until_end", "framed", "expected"),
    [
        ({"transfer-encoding": "chunked"}, True, b"1\r\na\r\n0\r\n\r\nz", (b"a", b"z")),
        ({"content-length": "2"}, True, b"abz", (b"ab", b"z")),
        ({}, True, b"ab", None),
    ],
)
def test_headers_choose_the_framing(
    headers: dict[str, str], until_end: bool, framed: bytes, expected: Outcome
) -> None:
    assert feed(body_decoder(headers, until_end=until_end), [framed]) == expected


def test_request_without_framing_has_no_body() -> None:
    assert body_decoder({}, until_end=False).is_complete


@settings(max_examples=25)
@given(chunked(), st.binary(min_size=1, max_size=9), CUTS)
async def test_wire_leaves_what_follows_a_body(
    chunks: list[bytes], rest: bytes, places: list[int]
) -> None:
    framed = b"".join(chunks)
    async with memory_wire(*cut(framed + rest, places)) as (wire, _):
        decoder = BodyDecoder(None)
        body = b""
        while piece := await read_body(wire, decoder):
            body += piece
        left = b""
        while piece := await some(wire):
            left += piece
        assert (body, left) == judge(framed + rest)


# ------------------------------------------------------------------------------
# Where a head ends
# ------------------------------------------------------------------------------


async def first_head(*pieces: bytes) -> tuple[bytes, bytes]:
    """(head, what follows it), as a wire reads them."""
    async with memory_wire(*pieces) as (wire, _):
        head = await read_head(wire)
        left = b""
        while piece := await some(wire):
            left += piece
        return head, left


@pytest.mark.parametrize("rest", [b"", b"body", b"\r\nGET", b"\n\r\x00"])
@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n\r\n"])
async def test_head_is_the_same_wherever_it_is_cut(before: bytes, rest: bytes) -> None:
    data = before + GET + rest
    for place in range(len(data)):
        assert await first_head(*cut(data, [place])) == (GET, rest)
    assert await first_head(*bytewise(data)) == (GET, rest)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"GET / HTTP/1.1\nHost: a\r\n\r\n", id="lf-behind-start"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\n\r\n\r\n", id="lf-behind-field"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n\n\r\n\r\n", id="lf-as-blank"),
        pytest.param(b"GET / HTTP/1.1\r\nA: b\rHost: a\r\n\r\n", id="cr-in-value"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", id="cr-cr-lf"),
        pytest.param(b"GET / HTTP/1.1\r\n\rHost: a\r\n\r\n", id="cr-before-name"),
        pytest.param(b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", id="lf-before-all"),
        pytest.param(b"\rGET / HTTP/1.1\r\nHost: a\r\n\r\n", id="cr-before-all"),
        pytest.param(b"\r\n\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", id="crlf-lf"),
        pytest.param(b"GET / HTTP/1.1\n\n", id="only-lf"),
    ],
)
async def test_bare_line_end_is_refused_wherever_it_is_cut(data: bytes) -> None:
    for pieces in (*(cut(data, [n]) for n in range(len(data))), bytewise(data)):
        with pytest.raises(MalformedHTTP):
            parse_request_head((await first_head(*pieces))[0])


@pytest.mark.parametrize("size", [1000, 4096, 10**6])
async def test_head_has_a_limit(size: int) -> None:
    start = b"GET / HTTP/1.1\r\nA: "
    fits = start + b"x" * (MAX_HEAD_BYTES - len(start)) + b"\r\n\r\n"
    assert await first_head(*cut(fits, range(0, 70000, size))) == (fits, b"")
    over = start + b"x" * (MAX_HEAD_BYTES - len(start) + 1) + b"\r\n\r\n"
    with pytest.raises(HeadTooLarge):
        await first_head(*cut(over, range(0, 70000, size)))


async def test_endless_head_is_refused_at_the_limit() -> None:
    async with memory_wire(*[b"x" * 1024] * 100) as (wire, _):
        with pytest.raises(HeadTooLarge):
            await read_head(wire)
        assert len(await some(wire)) == 1024  # it did not read all


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n"])
async def test_end_before_a_head_is_no_error(before: bytes) -> None:
    assert await first_head(before) == (b"", b"")


async def test_many_empty_lines_take_little_time() -> None:
    """The first one comes in two reads, so that it is not the server that skips it."""
    with at_most(40):
        lines = b"\n" + b"\r\n" * 32_000 + b"\r"
        assert await first_head(b"\r", *[lines] * 40, b"\n" + GET) == (GET, b"")


async def test_end_within_a_head_is_a_broken_connection() -> None:
    for size in range(1, len(GET)):
        with pytest.raises(ConnectionBroken):
            await first_head(GET[:size])


async def test_what_comes_in_pieces_before_a_read_is_kept() -> None:
    async with memory_wire() as (wire, _):
        for piece in bytewise(GET):
            wire.data_received(piece)
        assert await read_head(wire) == GET


async def test_pipelined_heads_are_read_one_by_one() -> None:
    other = GET.replace(b"/x", b"/y")
    async with memory_wire(GET + other) as (wire, _):
        assert await wire.wait_for_data()
        assert await read_head(wire) == GET
        assert skip_empty_lines(wire)
        assert await wire.wait_for_data()
        assert await read_head(wire) == other
        assert not skip_empty_lines(wire)
        assert not await wire.wait_for_data()


# ------------------------------------------------------------------------------
# What a request's head says
# ------------------------------------------------------------------------------


def head_of(*fields: str, start: str = "POST /x HTTP/1.1", host: str = "a") -> bytes:
    """A head with a Host field, as bytes."""
    lines = [start, *([f"Host: {host}"] if host else []), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def parse(head: bytes) -> Request:
    """Parse a head whose end is where it should be."""
    assert head.endswith(b"\r\n\r\n")
    return parse_request_head(head)


HOSTILE: list[Any] = [
    # Where the body ends
    pytest.param(
        head_of("Content-Length: 5", "Transfer-Encoding: chunked"), 400, id="cl-te"
    ),
    pytest.param(
        head_of("Transfer-Encoding: chunked", "Content-Length: 5"), 400, id="te-cl"
    ),
    pytest.param(
        head_of("Content-Length: 5", "Content-Length: 6"), 400, id="cl-unequal"
    ),
    pytest.param(
        head_of("Content-Length: 5", "Content-Length: 5"), 400, id="cl-repeated"
    ),
    pytest.param(head_of("Content-Length: 5, 5"), 400, id="cl-repeated-in-line"),
    pytest.param(head_of("Content-Length: 5, 6"), 400, id="cl-unequal-in-line"),
    pytest.param(head_of("Content-Length: 5,"), 400, id="cl-comma"),
    pytest.param(head_of("Content-Length: +5"), 400, id="cl-plus"),
    pytest.param(head_of("Content-Length: -5"), 400, id="cl-minus"),
    pytest.param(head_of("Content-Length: 0x5"), 400, id="cl-hex"),
    pytest.param(head_of("Content-Length: 1_0"), 400, id="cl-underscore"),
    pytest.param(head_of("Content-Length: 5 5"), 400, id="cl-space"),
    pytest.param(head_of("Content-Length: \xb2"), 400, id="cl-superscript"),
    pytest.param(head_of("Content-Length:"), 400, id="cl-empty"),
    pytest.param(head_of("Content-Length: " + "9" * 21), 400, id="cl-huge"),
    pytest.param(head_of("Content-Length: " + "9" * 5000), 400, id="cl-endless"),
    pytest.param(head_of("Transfer-Encoding: gzip"), 400, id="te-gzip"),
    pytest.param(head_of("Transfer-Encoding: gzip, chunked"), 400, id="te-two"),
    pytest.param(head_of("Transfer-Encoding: chunked, gzip"), 400, id="te-not-last"),
    pytest.param(head_of("Transfer-Encoding: chunked, chunked"), 400, id="te-twice"),
    pytest.param(head_of("Transfer-Encoding: identity"), 400, id="te-identity"),
    pytest.param(head_of("Transfer-Encoding: xchunked"), 400, id="te-unknown"),
    pytest.param(head_of("Transfer-Encoding: chunked;a=b"), 400, id="te-parameter"),
    pytest.param(head_of('Transfer-Encoding: "chunked"'), 400, id="te-quoted"),
    pytest.param(head_of("Transfer-Encoding: \x0bchunked"), 400, id="te-control"),
    pytest.param(
        head_of("Transfer-Encoding: chunked", start="POST /x HTTP/1.0"),
        400,
        id="te-in-1.0",
    ),
    # Fields
    pytest.param(head_of("A: b", " folded"), 400, id="folded"),
    pytest.param(head_of("A: b", "\tfolded"), 400, id="folded-by-tab"),
    pytest.param(head_of("A: b", " "), 400, id="folded-empty"),
    pytest.param(head_of(" A: b", host=""), 400, id="folded-first"),
    pytest.param(
        head_of("Transfer-Encoding:", " chunked"), 400, id="folded-transfer-encoding"
    ),
    pytest.param(head_of("A : b"), 400, id="space-before-colon"),
    pytest.param(head_of("A\t: b"), 400, id="tab-before-colon"),
    pytest.param(head_of("Content-Length : 5"), 400, id="cl-space-before-colon"),
    pytest.param(head_of(": b"), 400, id="no-name"),
    pytest.param(head_of("A"), 400, id="no-colon"),
    pytest.param(head_of("A B: c"), 400, id="space-in-name"),
    pytest.param(head_of("A(B): c"), 400, id="parenthesis-in-name"),
    pytest.param(head_of("\xc4: b"), 400, id="latin-1-in-name"),
    pytest.param(head_of("A\x00: b"), 400, id="nul-in-name"),
    pytest.param(head_of("A: b\x00c"), 400, id="nul-in-value"),
    pytest.param(head_of("A: b\x01c"), 400, id="control-in-value"),
    pytest.param(head_of("A: b\x7fc"), 400, id="delete-in-value"),
    pytest.param(head_of("A: b\x0bc"), 400, id="vertical-tab-in-value"),
    pytest.param(head_of(*["A: b"] * MAX_FIELDS), 431, id="too-many-fields"),
    # Host
    pytest.param(head_of(host=""), 400, id="no-host"),
    pytest.param(head_of("Host: a"), 400, id="two-hosts"),
    pytest.param(head_of("Host: b"), 400, id="two-unequal-hosts"),
    pytest.param(head_of(host="a, b"), 400, id="host-list"),
    pytest.param(head_of(host="a b"), 400, id="host-space"),
    pytest.param(head_of(host="a/b"), 400, id="host-path"),
    pytest.param(head_of(host="u@a"), 400, id="host-user"),
    pytest.param(head_of(host="a:b"), 400, id="host-port"),
    pytest.param(head_of(host="http://a"), 400, id="host-url"),
    pytest.param(head_of(host="[::1"), 400, id="host-bracket"),
    # The first line
    pytest.param(head_of(start="GET x HTTP/1.1"), 400, id="target-relative"),
    pytest.param(head_of(start="CONNECT a:443 HTTP/1.1"), 400, id="authority-form"),
    pytest.param(head_of(start="OPTIONS a:443 HTTP/1.1"), 400, id="authority-options"),
    pytest.param(head_of(start="GET a:443 HTTP/1.1"), 400, id="authority-for-get"),
    pytest.param(head_of(start="GET * HTTP/1.1"), 400, id="asterisk-for-get"),
    pytest.param(head_of(start="GET ftp://a/x HTTP/1.1"), 400, id="other-scheme"),
    pytest.param(head_of(start="GET http:///x HTTP/1.1"), 400, id="absolute-no-host"),
    pytest.param(head_of(start="GET http://u@a/x HTTP/1.1"), 400, id="absolute-user"),
    pytest.param(head_of(start="GET /a b HTTP/1.1"), 400, id="space-in-target"),
    pytest.param(head_of(start="GET /a\tb HTTP/1.1"), 400, id="tab-in-target"),
    pytest.param(head_of(start="GET /\x00 HTTP/1.1"), 400, id="nul-in-target"),
    pytest.param(head_of(start="GET /\xe9 HTTP/1.1"), 400, id="latin-1-in-target"),
    pytest.param(head_of(start="GET  / HTTP/1.1"), 400, id="two-spaces"),
    pytest.param(head_of(start=" GET / HTTP/1.1"), 400, id="space-first"),
    pytest.param(head_of(start="GET / HTTP/1.1 "), 400, id="space-last"),
    pytest.param(head_of(start="G@T / HTTP/1.1"), 400, id="method-no-token"),
    pytest.param(head_of(start="GET /"), 400, id="no-version"),
    pytest.param(head_of(start="GET / http/1.1"), 400, id="version-lower-case"),
    pytest.param(head_of(start="GET / HTTP/1"), 400, id="version-short"),
    pytest.param(head_of(start="GET / HTTP/1.10"), 400, id="version-long"),
    pytest.param(head_of(start="GET / HTTPS/1.1"), 400, id="version-name"),
    pytest.param(head_of(start="GET / HTTP/0.9"), 400, id="version-0.9"),
    pytest.param(head_of(start="GET / HTTP/2.0"), 400, id="version-2.0"),
    pytest.param(
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="tls-hello"
    ),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\n", 400, id="http-2-preface"),
    pytest.param(b"\x00\xff\r\n\r\n", 400, id="noise"),
]


@pytest.mark.parametrize(("head", "status"), HOSTILE)
def test_hostile_head_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(ProxyError) as caught:
        parse(head)
    assert (caught.value.status, caught.value.type) == (status, "invalid_request_error")


H = {"host": "a"}
HARMLESS: list[Any] = [
    pytest.param(head_of(), Request("POST", "/x", "", H), id="plain"),
    pytest.param(
        head_of(start="GET /a%2Fb?c=d?e HTTP/1.1"),
        Request("GET", "/a%2Fb", "c=d?e", H),
        id="query",
    ),
    pytest.param(
        head_of(start="GET //a HTTP/1.1"), Request("GET", "//a", "", H), id="slashes"
    ),
    pytest.param(
        head_of("A:b", "a:  c \t", "X-Empty:"),
        Request("POST", "/x", "", {**H, "a": "b, c", "x-empty": ""}),
        id="repeated-field",
    ),
    pytest.param(
        head_of("A: \xe9\xff\tz"),
        Request("POST", "/x", "", {**H, "a": "\xe9\xff\tz"}),
        id="latin-1-value",
    ),
    pytest.param(
        head_of("TRANSFER-ENCODING: Chunked"),
        Request("POST", "/x", "", {**H, "transfer-encoding": "chunked"}),
        id="spelling",
    ),
    pytest.param(
        head_of("Content-Length: 007"),
        Request("POST", "/x", "", {**H, "content-length": "007"}),
        id="leading-zeros",
    ),
    pytest.param(
        head_of(start="GET http://b:80/x?y HTTP/1.1"),
        Request("GET", "/x", "y", {"host": "b:80"}),
        id="absolute-form",
    ),
    pytest.param(
        head_of(start="GET HTTPS://b HTTP/1.1"),
        Request("GET", "/", "", {"host": "b"}),
        id="absolute-form-without-path",
    ),
    pytest.param(
        head_of(start="OPTIONS * HTTP/1.1"),
        Request("OPTIONS", "/", "", H),
        id="asterisk",
    ),
    pytest.param(
        head_of(start="GET / HTTP/1.0", host=""),
        Request("GET", "/", "", {}, "1.0"),
        id="1.0-without-host",
    ),
    pytest.param(
        head_of(host="[::1]:5000"),
        Request("POST", "/x", "", {"host": "[::1]:5000"}),
        id="ipv6-host",
    ),
    pytest.param(
        head_of(host="xn--p1ai.example_1:80"),
        Request("POST", "/x", "", {"host": "xn--p1ai.example_1:80"}),
        id="odd-host",
    ),
    pytest.param(
        head_of(*["A: b"] * (MAX_FIELDS - 1)),
        Request("POST", "/x", "", {**H, "a": ", ".join(["b"] * (MAX_FIELDS - 1))}),
        id="many-fields",
    ),
]


@pytest.mark.parametrize(("head", "request_"), HARMLESS)
def test_head_is_understood(head: bytes, request_: Request) -> None:
    assert parse(head) == request_


@given(st.binary(max_size=60), st.integers(0, 80), st.booleans())
def test_any_head_is_a_request_or_a_refusal(
    noise: bytes, place: int, at_random: bool
) -> None:
    head = noise if at_random else GET[:place] + noise + GET[place:]
    try:
        request = parse_request_head(head.replace(b"\r\n\r\n", b"") + b"\r\n\r\n")
    except ProxyError as error:
        assert error.status in (400, 431)
    else:
        assert request.http_version in ("1.0", "1.1")


def test_tls_on_a_plain_port_is_told() -> None:
    hello = ssl.MemoryBIO()
    secure = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, False, "a")
    with pytest.raises(ssl.SSLWantReadError):
        secure.do_handshake()
    with pytest.raises(MalformedHTTP, match="begins with http://"):
        check_line_ends(hello.read() + b"\n")  # nearly all have one anyway


def test_response_fields_are_read_as_strictly() -> None:
    framing = [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")]
    with pytest.raises(MalformedHTTP):
        read_fields(framing)


@pytest.mark.parametrize(
    ("fields", "version", "is_the_last", "expects_continue"),
    [
        ({}, "1.1", False, False),
        ({"connection": "close"}, "1.1", True, False),
        ({"connection": "Keep-Alive, Close"}, "1.1", True, False),
        ({"connection": "keep-alive ,\tclose"}, "1.1", True, False),
        ({"connection": "keep-alive"}, "1.0", True, False),
        ({"connection": "not-close"}, "1.1", False, False),
        ({"expect": "100-Continue"}, "1.1", False, True),
        ({"expect": "100-continue"}, "1.0", True, False),
        ({"expect": "something"}, "1.1", False, False),
    ],
)
def test_request_tells_how_to_go_on(
    fields: dict[str, str], version: str, is_the_last: bool, expects_continue: bool
) -> None:
    request = Request("GET", "/", "", fields, version)
    assert ends_connection(fields, version) is is_the_last
    assert request.expects_continue is expects_continue


# ------------------------------------------------------------------------------
# Replies
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\rb", "\r\n\r\n"])
def test_field_that_would_break_out_of_its_line_is_not_sent(value: str) -> None:
    for name, text in (("A", value), (value, "b")):
        with pytest.raises(ValueError, match="line end"):
            encode_head("HTTP/1.1 200 OK", [(name, text)])


EPOCH = "Thu, 01 Jan 1970 00:00:00"
DATE = b"Date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"  # the RFC's own


@pytest.fixture
def then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be at that time."""
    monkeypatch.setattr("time.time", lambda: 784111777.9)


REPLIES: list[Any] = [
    pytest.param(
        "GET",
        "1.1",
        {},
        b"HTTP/1.1 200 OK\r\n" + DATE + b"A: b\r\nX: y\r\nContent-Length: 2\r\n\r\nhi",
        False,
        id="plain",
    ),
    pytest.param(
        "GET",
        "1.1",
        {"connection": "close"},
        b"HTTP/1.1 200 OK\r\n" + DATE + b"A: b\r\nX: y\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\nhi",
        True,
        id="close",
    ),
    pytest.param(
        "GET",
        "1.0",
        {},
        b"HTTP/1.1 200 OK\r\n" + DATE + b"A: b\r\nX: y\r\nContent-Length: 2\r\n"
        b"Connection: close\r\n\r\nhi",
        True,
        id="1.0",
    ),
    pytest.param(
        "HEAD",
        "1.1",
        {},
        b"HTTP/1.1 200 OK\r\n" + DATE + b"A: b\r\nX: y\r\nContent-Length: 2\r\n\r\n",
        False,
        id="head",
    ),
]


@pytest.mark.usefixtures("then")
@pytest.mark.parametrize(("method", "version", "fields", "sent", "close"), REPLIES)
async def test_whole_reply(
    method: str, version: str, fields: dict[str, str], sent: bytes, close: bool
) -> None:
    async with memory_wire() as (wire, transport):
        reply = Reply(wire, Request(method, "/", "", fields, version))
        reply.headers.append(("X", "y"))
        reply.send(200, b"hi", [("A", "b")])
        assert transport.sent == sent
        assert (reply.status, reply.is_complete, reply.must_close) == (200, True, close)


@pytest.mark.usefixtures("then")
async def test_reply_without_content_has_no_length() -> None:
    async with memory_wire() as (wire, transport):
        Reply(wire, Request("OPTIONS", "/", "", {})).send(204)
        assert transport.sent == b"HTTP/1.1 204 No Content\r\n" + DATE + b"\r\n"


@pytest.mark.usefixtures("then")
async def test_reply_to_what_was_not_understood_closes() -> None:
    async with memory_wire() as (wire, transport):
        Reply(wire).send(400, b"no")
        assert transport.sent == (
            b"HTTP/1.1 400 Bad Request\r\n" + DATE + b"Content-Length: 2\r\n"
            b"Connection: close\r\n\r\nno"
        )


STREAMED: list[Any] = [
    pytest.param(
        "POST",
        "1.1",
        [
            b"HTTP/1.1 200 OK\r\n"
            + DATE
            + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
            b"a\r\n0123456789\r\n",
            b"1\r\nz\r\n0\r\n\r\n",
        ],
        False,
        id="chunked",
    ),
    pytest.param(
        "POST",
        "1.0",
        [
            b"HTTP/1.1 200 OK\r\n" + DATE + b"Connection: close\r\n\r\nab",
            b"0123456789",
            b"z",
        ],
        True,
        id="1.0",
    ),
    pytest.param(
        "HEAD",
        "1.1",
        [
            b"HTTP/1.1 200 OK\r\n" + DATE + b"Transfer-Encoding: chunked\r\n\r\n",
            b"",
            b"",
        ],
        False,
        id="head",
    ),
]


@pytest.mark.usefixtures("then")
@pytest.mark.parametrize(("method", "version", "sent", "close"), STREAMED)
async def test_streamed_reply_leaves_piece_by_piece(
    method: str, version: str, sent: list[bytes], close: bool
) -> None:
    async with memory_wire() as (wire, transport):
        reply = Reply(wire, Request(method, "/", "", {}, version))
        reply.start(200)
        assert transport.sent == b""  # the head waits for the first bytes
        reply.write(b"ab")
        seen = [transport.sent]
        reply.write(b"0123456789")
        seen.append(transport.sent[len(b"".join(seen)) :])
        reply.write(b"")  # an empty chunk would end the body
        assert not reply.is_complete
        reply.end(b"z")
        seen.append(transport.sent[len(b"".join(seen)) :])
        assert seen == sent
        assert (reply.is_complete, reply.must_close) == (True, close)


@pytest.mark.usefixtures("then")
async def test_streamed_reply_may_end_without_a_byte() -> None:
    async with memory_wire() as (wire, transport):
        reply = Reply(wire, Request("POST", "/", "", {}))
        reply.start(200)
        reply.end()
        assert transport.sent == (
            b"HTTP/1.1 200 OK\r\n"
            + DATE
            + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        )


async def test_each_reply_has_the_date_of_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RFC 9110, section 6.6.1; a clock may be set back, too."""
    for at, date in [(951782399.9, "Mon, 28 Feb 2000 23:59:59"), (0.0, EPOCH)]:
        monkeypatch.setattr("time.time", lambda at=at: at)
        async with memory_wire() as (wire, transport):
            Reply(wire).send(404)
            head = transport.sent.decode().split("\r\n")
        assert [row for row in head if row.startswith("Date")] == [f"Date: {date} GMT"]


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=50), max_size=6))
async def test_streamed_reply_is_what_h11_reads(pieces: list[bytes]) -> None:
    async with memory_wire() as (wire, transport):
        reply = Reply(wire, Request("POST", "/", "", {}))
        reply.start(200, [("A", "b")])
        for piece in pieces:
            reply.write(piece)
        reply.end()
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="POST", target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(transport.sent)
        events: list[Any] = []
        while not events or type(events[-1]) is not h11.EndOfMessage:
            events.append(client.next_event())
        body = b"".join(e.data for e in events if isinstance(e, h11.Data))
        assert (body, reply.body_bytes) == (b"".join(pieces), len(b"".join(pieces)))


# ------------------------------------------------------------------------------
# Deadlines
# ------------------------------------------------------------------------------


class TooLate(Exception):
    """A deadline's own error."""


class AnotherError(Exception):
    """That of another deadline."""


async def test_read_ends_at_its_deadline_with_its_error() -> None:
    async with wired() as (wire, _):
        wire.set_deadline(5, TooLate)
        with pytest.raises(TooLate):
            await some(wire)
        assert now() == 5


async def test_last_deadline_counts_when_moved_either_way() -> None:
    async with wired() as (wire, _):
        for seconds in (9, 5, 7):
            wire.set_deadline(seconds, AnotherError)
        wire.set_deadline(6, TooLate)
        with pytest.raises(TooLate):
            await some(wire)
        assert now() == 6


async def test_deadline_that_is_lifted_does_not_strike() -> None:
    async with wired() as (wire, far):
        wire.set_deadline(5, TooLate)
        wire.clear_deadline()
        asyncio.get_running_loop().call_later(9, far.send, b"late")
        assert await some(wire) == b"late"
        assert now() == 9


async def test_deadline_does_not_strike_while_nobody_takes_what_came() -> None:
    async with wired() as (wire, far):
        wire.set_deadline(5, TooLate)
        far.send(b"in time")
        await asyncio.sleep(9)
        assert await some(wire) == b"in time"
        wire.set_deadline(5, TooLate)
        with pytest.raises(TooLate):
            await some(wire)
        assert now() == 14


async def test_deadline_that_passed_in_a_stop_lets_what_came_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wait that a stop has ended (EINTR) brings timers alone, whatever came."""
    selector = cast(VirtualClockLoop, asyncio.get_running_loop()).jumping

    def stop(_: float | None) -> list[Any]:
        monkeypatch.undo()
        selector.now += 60
        return []

    async with wired() as (wire, far):
        wire.set_deadline(5, TooLate)
        far.send(b"in time")
        monkeypatch.setattr(selector, "select", stop)
        assert await some(wire) == b"in time"
        wire.set_deadline(5, TooLate)
        monkeypatch.setattr(selector, "select", stop)
        with pytest.raises(TooLate):
            await some(wire)


async def test_deadline_that_passed_unawaited_is_told_to_who_reads_next() -> None:
    async with wired() as (wire, _):
        wire.set_deadline(5, TooLate)
        await asyncio.sleep(6)
        with pytest.raises(TooLate):
            await some(wire)


async def test_deadline_of_a_head_counts_from_its_beginning() -> None:
    """One byte now and then does not buy more time."""
    async with wired() as (wire, far):
        wire.set_deadline(5, TooLate)
        for second in range(20):
            asyncio.get_running_loop().call_later(second, far.send, b"x")
        with pytest.raises(TooLate):
            await read_head(wire)
        assert now() == 5


async def test_read_ends_when_the_peer_resets() -> None:
    async with wired() as (wire, far):
        wire.write(b"unread")
        await asyncio.sleep(0)
        far.close()  # with data unread: a reset
        with pytest.raises(ConnectionBroken):
            while await some(wire):
                pass
            await wire.drain()


# ------------------------------------------------------------------------------
# Peers that leave or don't read
# ------------------------------------------------------------------------------

MUCH = b"x" * 20_000_000  # more than the kernel takes


async def test_drain_gives_up_a_peer_that_reads_nothing() -> None:
    async with wired() as (wire, _):
        wire.write(MUCH)
        with pytest.raises(ConnectionBroken):
            await wire.drain()
        # The kernel may have taken some after the write.
        assert WRITE_TIMEOUT_S <= now() <= 2 * WRITE_TIMEOUT_S
        assert wire.is_stale


@pytest.mark.parametrize("is_closing", [False, True])
async def test_peer_that_reads_slowly_gets_all(is_closing: bool) -> None:
    """20 kB a second are few, but not nothing; a third of what the kernel takes."""
    async with wired() as (wire, far):
        much = MUCH[:6_000_000]
        wire.write(much)
        writing = asyncio.ensure_future(wire.drain())
        await asyncio.sleep(0)
        if is_closing:
            writing.cancel()
            wire.close()
        got = 0
        while got < len(much):
            await asyncio.sleep(1)
            got += len(far.recv(20_000))
        assert now() > 4 * WRITE_TIMEOUT_S
        if not is_closing:
            await writing


async def test_peer_that_reads_slowly_and_then_no_more_is_given_up() -> None:
    async with wired() as (wire, far):
        wire.write(MUCH)
        writing = asyncio.ensure_future(wire.drain())
        while now() < 3 * WRITE_TIMEOUT_S:
            await asyncio.sleep(1)
            far.recv(100_000)
        with pytest.raises(ConnectionBroken):
            await writing
        assert now() <= 5 * WRITE_TIMEOUT_S


async def test_slow_reader_has_no_more_time_to_answer() -> None:
    async with wired() as (wire, far):
        wire.write(MUCH)
        writing = asyncio.ensure_future(wire.drain())
        left = len(MUCH)
        while left:
            left -= len(await asyncio.get_running_loop().sock_recv(far, left))
        await writing
        wire.write(MUCH[: len(MUCH) // 2])
        wire.set_deadline(5, TooLate)
        with pytest.raises(TooLate):
            await some(wire)
        assert now() == 5


async def test_write_that_is_not_waited_for_gives_no_more_time_to_answer() -> None:
    async with wired() as (wire, far):
        wire.write(MUCH)
        writing = asyncio.ensure_future(wire.drain())
        await asyncio.sleep(0)
        writing.cancel()
        left = len(MUCH)
        while left:
            left -= len(await asyncio.get_running_loop().sock_recv(far, left))
        wire.set_deadline(5, TooLate)
        with pytest.raises(TooLate):
            await some(wire)
        assert now() == 5


async def test_drain_waits_for_a_peer_that_reads_late() -> None:
    async with wired() as (wire, far):
        loop = asyncio.get_running_loop()
        wire.write(MUCH)
        draining = asyncio.ensure_future(wire.drain())
        await asyncio.sleep(WRITE_TIMEOUT_S - 1)
        assert not draining.done()
        assert wire.must_drain()
        got = 0
        while got < len(MUCH):
            got += len(await loop.sock_recv(far, 10**6))
        await draining
        assert not wire.must_drain()
        assert now() < WRITE_TIMEOUT_S
        await asyncio.sleep(2 * WRITE_TIMEOUT_S)
        far.send(b"later")
        assert await some(wire) == b"later"  # the write's deadline is gone


async def test_socket_rests_while_nobody_takes_what_came() -> None:
    """Else a peer that sends without end would fill the memory."""
    async with wired() as (wire, far):
        loop = asyncio.get_running_loop()
        sending = asyncio.ensure_future(loop.sock_sendall(far, MUCH))
        await asyncio.sleep(1)
        assert not sending.done()
        got = 0
        while got < len(MUCH):
            got += len(await some(wire))
        await sending


async def test_socket_rests_while_requests_that_came_are_not_served() -> None:
    """Else a client that sends many ahead would fill the memory, one by one."""
    async with wired() as (wire, far):
        ahead = asyncio.get_running_loop().sock_sendall(far, GET * 200_000)
        sending = asyncio.ensure_future(ahead)
        for _ in range(20):
            assert await read_head(wire) == GET
            await asyncio.sleep(1)
        assert len(wire.unread) < 10 * READ_BUFFER_BYTES
        while not sending.done():
            await some(wire)
        await sending


async def test_drain_tells_that_the_connection_is_closed() -> None:
    async with wired() as (wire, _):
        wire.close()
        with pytest.raises(ConnectionBroken):
            await wire.drain()


async def test_drain_tells_why_the_connection_is_closed() -> None:
    async with wired() as (wire, _):
        wire.write(MUCH)
        wire.set_deadline(5, TooLate)
        await asyncio.sleep(6)
        with pytest.raises(TooLate):
            await wire.drain()


async def test_read_tells_why_the_connection_is_lost() -> None:
    async with wired() as (wire, _):
        wire.connection_lost(OSError("reset by peer"))
        with pytest.raises(ConnectionBroken, match="reset by peer"):
            await some(wire)


async def test_close_sends_what_was_written() -> None:
    async with wired() as (wire, far):
        wire.write(MUCH)
        wire.close()
        wire.close()
        loop = asyncio.get_running_loop()
        got = 0
        while data := await loop.sock_recv(far, 10**6):
            got += len(data)
        assert got == len(MUCH)


async def test_connection_that_is_lost_can_be_aborted() -> None:
    """Its last bytes went after `close`, whose deadline comes all the same."""
    async with wired() as (wire, far):
        wire.write(MUCH)
        wire.close()
        loop = asyncio.get_running_loop()
        faults: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: faults.append(context))
        while await loop.sock_recv(far, 10**6):
            pass
        await asyncio.sleep(2 * WRITE_TIMEOUT_S)
        wire.abort()
        assert faults == []


async def test_close_gives_up_a_peer_that_reads_nothing() -> None:
    """Else anyone could take a descriptor for ever by not reading an answer."""
    async with wired() as (wire, far):
        wire.write(MUCH)
        wire.close()
        await asyncio.sleep(2 * WRITE_TIMEOUT_S)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while data := far.recv(10**6):  # BlockingIOError: it is still open
                got += len(data)
        assert got < len(MUCH)


async def test_abort_closes_at_once() -> None:
    async with wired() as (wire, far):
        wire.write(MUCH)
        wire.abort()
        await asyncio.sleep(0)
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while data := far.recv(10**6):
                got += len(data)
        assert got < len(MUCH)


@pytest.mark.parametrize("unread", [b"", b"unread"])
async def test_leaving_is_told_while_nobody_reads(unread: bytes) -> None:
    async with wired() as (wire, far):
        left = asyncio.Event()
        wire.on_leave = left.set
        wire.write(unread)
        await asyncio.sleep(0)
        far.close()  # an end, or with data unread a reset
        await asyncio.wait_for(left.wait(), 1)


@pytest.mark.parametrize("has_body", [False, True])
async def test_leaving_is_told_once_all_that_came_is_taken(has_body: bool) -> None:
    """Though it was so much at once that the socket rested."""
    much = bytes(READ_BUFFER_BYTES + 1) if has_body else GET * (READ_BUFFER_BYTES // 20)
    async with wired() as (wire, far):
        left, body = asyncio.Event(), BodyDecoder(len(much))
        wire.on_leave = left.set
        await asyncio.get_running_loop().sock_sendall(far, much)
        await asyncio.sleep(1)
        while wire.unread:
            await (read_body(wire, body) if has_body else read_head(wire))
        far.close()
        await asyncio.wait_for(left.wait(), 1)


async def test_deadline_is_no_leaving() -> None:
    async with wired() as (wire, _):
        left = asyncio.Event()
        wire.on_leave = left.set
        wire.set_deadline(1, TooLate)
        await asyncio.sleep(2)
        assert not left.is_set()


async def test_idle_connection_is_stale_when_anything_happened_to_it() -> None:
    async with wired() as (wire, far):
        assert not wire.is_stale
        far.close()
        await asyncio.sleep(0.1)
        assert wire.is_stale
    async with wired() as (wire, _):
        wire.close()
        assert wire.is_stale


async def test_idle_connection_is_stale_while_a_request_is_unsent() -> None:
    """An early answer, such as a 413, may come before the request is taken."""
    async with wired() as (wire, _):
        wire.write(MUCH)
        assert wire.is_stale
