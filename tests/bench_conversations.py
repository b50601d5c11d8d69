#!/usr/bin/env python3
"""Measure the table of conversations.

    python tests/bench_conversations.py    # takes a minute

Prints the medians of what a turn costs: hashing its history, finding and taking the
conversation, putting it back moved on by one exchange. And what a conversation weighs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Callable

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from opendify import Ask, Conversations, Message, Tail, scope_of  # noqa: E402

CONVERSATIONS = 100_000
EXCHANGES = 10
TURNS = 2000
WORDS = "Neither the question nor its answer is any longer than most of them are. "
SCOPE = scope_of("app-a-key-of-some-length", "somebody@example.org")


def transcript(number: int) -> tuple[Message, ...]:
    """Ten exchanges of about 900 characters each, like no other conversation's."""
    rows: list[Message] = []
    for i in range(EXCHANGES):
        rows.append(Message("user", f"{number} {i} {WORDS * 2}"))
        rows.append(Message("assistant", f"{number} {i} {WORDS * 10}"))
    return tuple(rows)


def tail_of(number: int) -> Tail:
    """The tail of a conversation, its older messages made up to save time."""
    last = transcript(number)[-4:]
    start = Tail(
        SCOPE, f"{number:08}-1111-4222-8333-444455556666", number.to_bytes(16, "big")
    )
    made_up = bytes(8 * (2 * EXCHANGES - 4 - 1)) + number.to_bytes(8, "big")
    start = Tail(SCOPE, start.conversation_id, start.chain, 2 * EXCHANGES - 4, made_up)
    return start.extend(last)


def timed(action: Callable[[int], object], numbers: range) -> tuple[float, float]:
    """(median, 99th percentile) of what an action takes, in µs."""
    took = []
    for number in numbers:
        start = time.perf_counter()
        action(number)
        took.append((time.perf_counter() - start) * 1e6)
    return median(took), quantiles(took, n=100)[-1]


def measure(title: str, path: str) -> Conversations:
    """Fill a table, take turns in it, print what they took."""
    table = Conversations(path, 1e9)
    for number in range(CONVERSATIONS):
        table.put(tail_of(number), float(number))
    assert len(table) == CONVERSATIONS
    now = float(CONVERSATIONS)
    asks: dict[int, Ask] = {}
    tails: dict[int, Tail] = {}
    numbers = range(0, CONVERSATIONS, CONVERSATIONS // TURNS)
    for number in numbers:
        asks[number] = Ask("m", (*transcript(number)[-4:], Message("user", "And?")))

    def take(number: int) -> None:
        tail = table.take(asks[number], SCOPE, now)
        assert tail
        tails[number] = tail

    def put(number: int) -> None:
        table.put(tails[number], now)

    def miss(number: int) -> None:
        assert table.take(Ask("m", asks[number].messages[2:]), SCOPE, now) is None

    print(title)
    for name, action in (("  take", take), ("  put back", put), ("  not found", miss)):
        if name == "  put back":
            exchange = (Message("user", "And?"), Message("assistant", WORDS))
            tails.update({number: tails[number].extend(exchange) for number in numbers})
        middle, slow = timed(action, numbers)
        print(f"{name:14}{middle:8.0f} µs, 99% below {slow:6.0f} µs")
    return table


def main() -> None:
    """Print all figures."""
    messages = transcript(0)
    middle, _ = timed(lambda _: Tail(SCOPE, chain=SCOPE).extend(messages), range(1000))
    size = sum(len(row.text) for row in messages)
    print(f"{CONVERSATIONS:,} conversations of {2 * EXCHANGES} messages")
    print(f"Hashing a history of {len(messages)} messages, {size:,} characters")
    print(f"              {middle:8.0f} µs")
    before = resident_bytes()
    table = measure("In memory", ":memory:")
    grown = resident_bytes() - before
    if grown > 0:
        print(f"  memory      {grown / CONVERSATIONS:8.0f} bytes a conversation")
    table.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "conversations.db")
        table = measure("In a file", str(path))
        table.close()
        size = path.stat().st_size
        print(f"  on disk     {size / CONVERSATIONS:8.0f} bytes a conversation")


def resident_bytes() -> int:
    """The memory of this process, 0 where the system doesn't tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * 4096


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
