"""When each piece of text is due: the bounds, the pace, and whole clusters.

Nothing here waits: `play` is a caller whose clock is a number. It pushes what arrives,
takes at once, and takes again when `next_due` says so, or a little later.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opendify import Pacer

Pieces = list[tuple[float, str]]
MAX_LAG = 0.4
CLOSE = 1e-6  # floats that should be equal
COMPUTING = "\U0001f469\u200d\U0001f4bb"  # one cluster of three characters
FAMILY = "\u200d".join("\U0001f468\U0001f469\U0001f467\U0001f466")  # one of seven
LONG = "Streaming text should feel like watching somebody write. " * 40


def play(
    arrivals: Pieces, max_lag: float = MAX_LAG, lateness: Sequence[float] = (0.0,)
) -> Pieces:
    """Run `[(seconds, text)]` through a pacer; returns the pieces, likewise.

    `lateness` are the seconds by which the timers are late, in turn.
    """
    pacer, queue, late = Pacer(max_lag), list(arrivals), 0
    pieces: Pieces = []

    def take(now: float) -> None:
        if text := pacer.take(now):
            pieces.append((now, text))

    now = arrivals[0][0]
    for _ in range(100_000):
        due = pacer.next_due()
        if due is None and not queue:
            return pieces
        wake = None if due is None else due + lateness[late % len(lateness)]
        if wake is None or (queue and queue[0][0] <= wake):
            now, text = max(now, queue[0][0]), queue.pop(0)[1]
            pacer.push(text, now)
            take(now)
            if not queue:
                pacer.close(now)
        else:
            now, late = max(now, wake), late + 1
            take(now)
    raise AssertionError("the pacer never let go")


def take_next(pacer: Pacer) -> str:
    """What the pacer gives when its timer fires."""
    due = pacer.next_due()
    assert due is not None
    return pacer.take(due)


def joined(pieces: Pieces) -> str:
    return "".join(text for _, text in pieces)


def lags(arrivals: Pieces, pieces: Pieces) -> list[float]:
    """Seconds that each character was held."""
    came = [seconds for seconds, text in arrivals for _ in text]
    went = [seconds for seconds, text in pieces for _ in text]
    return [late - early for early, late in zip(came, went)]


def even(gap: float, count: int, text: str = "word") -> Pieces:
    return [(index * gap, text) for index in range(count)]


# Due times...


def test_first_text_goes_at_once_and_the_rest_of_it_on_the_next_beats() -> None:
    pacer = Pacer()
    pacer.push("Hello", 10.0)
    assert pacer.take(10.0) == "He"  # one character for coming first, one that is due
    assert pacer.held == 3
    assert pacer.next_due() == pytest.approx(10.0 + 1 / 49)
    assert (pacer.take(10.01), pacer.held) == ("", 3)
    pacer.close(10.01)
    due = [(take_next(pacer), pacer.next_due()) for _ in range(3)]
    beats = [pytest.approx(10.0 + beat / 49) for beat in (2, 3)]
    assert due == [("l", beats[0]), ("l", beats[1]), ("o", None)]


def test_nothing_is_due_when_nothing_is_held() -> None:
    pacer = Pacer()
    assert pacer.next_due() is None
    assert pacer.take(1.0) == ""
    pacer.push("", 2.0)
    assert pacer.next_due() is None
    pacer.close(3.0)
    assert (pacer.next_due(), pacer.take(3.0), pacer.flush()) == (None, "", "")


def test_whole_answer_is_spread_evenly_over_the_lag() -> None:
    pieces = play([(0.0, LONG[:490])])
    assert [seconds for seconds, _ in pieces] == pytest.approx(
        [beat / 49 for beat in range(20)]
    )
    assert [len(text) for _, text in pieces] == [26, 24, *[25] * 17, 15]


def test_even_tokens_pass_one_by_one_soon_after_they_came() -> None:
    arrivals = even(0.05, 100)
    pieces = play(arrivals)
    assert {len(text) for seconds, text in pieces if 2 < seconds < 4.9} == {3, 4, 5}
    assert len([seconds for seconds, _ in pieces if 2 < seconds < 4]) == 40
    assert sorted(lags(arrivals, pieces))[200] <= 0.1


def test_dense_tokens_cost_thirty_pieces_a_second_and_little_time() -> None:
    arrivals = even(0.004, 1000)
    pieces = play(arrivals)
    assert len(pieces) / 4 == pytest.approx(30, abs=3)
    assert sorted(lags(arrivals, pieces))[2000] <= 0.03


def test_sentences_are_held_until_the_next_one_comes() -> None:
    arrivals = even(0.35, 12, LONG[:60])
    pieces = [seconds for seconds, _ in play(arrivals) if 1.0 < seconds < 3.5]
    gaps = [late - early for early, late in zip(pieces, pieces[1:])]
    assert max(gaps) < 0.05


@pytest.mark.parametrize(
    "token", ["abc", "नमत", "ไทย", "👍👍"]
)  # all but the first may grow
def test_slow_tokens_are_shown_letter_by_letter(token: str) -> None:
    pieces = play(even(1 / 6, 48, token))
    assert {len(text) for seconds, text in pieces if seconds > 1} == {1}


def test_late_timer_shifts_only_its_own_piece() -> None:
    prompt = play([(0.0, LONG[:490])])
    late = play([(0.0, LONG[:490])], lateness=(0.0, 0.006, 0.0, 0.012))
    assert len(prompt) == len(late)
    for (due, _), (shown, _) in zip(prompt, late):
        assert due - CLOSE <= shown <= due + 0.0125


def test_timer_may_be_a_little_early() -> None:
    pacer = Pacer()
    pacer.push(LONG, 0.0)
    assert pacer.take(0.0)
    assert (pacer.take(1 / 49 - 0.0006), pacer.take(1 / 49 - 0.0004) > "") == ("", True)


def test_empty_text_is_no_arrival() -> None:
    words = even(0.2, 20)
    empties = [(at - 0.1, "") for at, _ in words[1:]]
    assert play(sorted([*words, *empties])) == play(words)


def test_caller_that_slept_gets_what_is_overdue_at_once() -> None:
    pacer = Pacer()
    pacer.push(LONG[:300], 0.0)
    first = pacer.take(0.0)
    assert pacer.take(5.0) == LONG[len(first) : 300]
    assert pacer.next_due() is None


def test_close_goes_on_at_the_source_s_own_rate() -> None:
    arrivals = even(0.05, 60)
    pieces = play(arrivals)
    assert pieces[-1][0] - arrivals[-1][0] <= 0.15
    assert pieces[-1][0] - arrivals[-1][0] > 0.02  # yet not all at once


def test_flush_gives_everything_and_the_next_text_goes_at_once() -> None:
    pacer = Pacer()
    pacer.push(LONG[:50], 0.0)
    shown = pacer.take(0.0) + pacer.flush()
    assert shown == LONG[:50]
    assert (pacer.held, pacer.next_due(), pacer.flush()) == (0, None, "")
    pacer.push("more", 0.001)
    assert pacer.take(0.001)


def test_flush_ends_the_wait_for_what_was_shown_ahead() -> None:
    pacer = Pacer()
    pacer.push("a", 0.0)
    assert pacer.take(0.0) == "a"
    pacer.push(FAMILY + "b", 0.2)
    assert (pacer.take(0.2), pacer.flush()) == (FAMILY, "b")
    pacer.push("c", 0.201)
    assert pacer.take(0.201) == "c"


def test_text_goes_at_once_after_a_long_silence() -> None:
    pacer = Pacer()
    pacer.push("one", 0.0)
    while pacer.next_due() is not None:
        take_next(pacer)
    pacer.push("two", 9.0)
    assert pacer.take(9.0)


def test_no_lag_holds_nothing() -> None:
    arrivals = even(0.003, 50)
    assert play(arrivals, max_lag=0.0) == arrivals


def test_one_packet_of_many_events_is_one_arrival() -> None:
    packets = [(at / 2 + n / 10_000, "word") for at in range(8) for n in range(15)]
    whole = [(at / 2, "word" * 15) for at in range(8)]
    split, joint = play(packets), play(whole)
    assert len(split) == pytest.approx(len(joint), abs=8)
    assert sorted(lags(packets, split))[240] == pytest.approx(0.2, abs=0.05)


def test_huge_text_costs_no_more_than_its_length() -> None:
    for text in ("x" * 1_500_000, "👩\u200d💻" * 100_000, "e" + "\u0301" * 300_000):
        pieces = play([(0.0, text)])
        assert joined(pieces) == text
        assert len(pieces) <= 20


def test_long_cluster_does_not_delay_the_next_by_more_than_a_beat_or_two() -> None:
    """It is shown whole, though less was due: that is no debt to be paid back."""
    pieces = play([(0.0, "x"), (0.1, COMPUTING * 3)], lateness=[0.01])
    assert [text for _, text in pieces] == ["x", *[COMPUTING] * 3]
    assert [at for at, _ in pieces] == pytest.approx([0, 0.1, 0.155, 0.194], abs=0.001)


def test_arrival_does_not_turn_what_was_shown_ahead_into_credit() -> None:
    """Seven characters went when one was due; the next ones wait, whatever comes."""
    slow = even(0.2, 3, "a")
    rest = [(0.6, FAMILY + "a"), (0.63, "b"), (0.66, "c"), (0.69, "d")]
    pieces = play([*slow, *rest])[3:]
    assert [text for _, text in pieces] == [FAMILY, *"abcd"]
    assert pieces[1][0] == pytest.approx(0.71, abs=0.001)


def test_text_that_waited_for_its_end_brings_no_clump_later() -> None:
    pieces = play([(0.0, COMPUTING * 2), (0.6, "word ")])
    assert [text for _, text in pieces] == [COMPUTING, COMPUTING, *"word "]


# Clusters...

WOMAN, JOINER, LAPTOP = "\U0001f469", "\u200d", "\U0001f4bb"
CAREFUL = [
    pytest.param(WOMAN + JOINER, LAPTOP, id="joiner"),
    pytest.param(WOMAN, JOINER + LAPTOP, id="before-joiner"),
    pytest.param("\U0001f1e8", "\U0001f1f3", id="flag"),
    pytest.param("\U0001f1e8\U0001f1f3\U0001f1e9", "\U0001f1ea", id="second-flag"),
    pytest.param("\u270d", "\U0001f3fd", id="skin-tone"),
    pytest.param("\u2764", "\ufe0f", id="variation"),
    pytest.param("\xa9", "\ufe0f", id="latin-sign"),
    pytest.param("1\ufe0f", "\u20e3", id="keycap"),
    pytest.param("\U0001f3f4\U000e0067", "\U000e0062", id="tags"),
    pytest.param("e\u0302", "\u0301", id="second-mark"),
    pytest.param("\u0e01", "\u0e49", id="thai"),
    pytest.param("\u0e19", "\u0e33", id="thai-am"),
    pytest.param("\u0915\u094d", "\u0937", id="virama"),
    pytest.param("\u0915", "\u093f", id="devanagari"),
    pytest.param("\u0645", "\u064f", id="arabic"),
    pytest.param("\U0001e900", "\U0001e944", id="adlam"),
    pytest.param("\u1112\u1161", "\u11ab", id="jamo"),
    pytest.param("\r", "\n", id="crlf"),
]


@pytest.mark.parametrize(("half", "rest"), CAREFUL)
def test_cluster_waits_for_its_other_half(half: str, rest: str) -> None:
    pieces = play([(0.0, "Hi " + half), (0.3, rest + " you")])
    assert joined(pieces) == "Hi " + half + rest + " you"
    assert len("Hi " + half) not in accumulate(len(text) for _, text in pieces)


@pytest.mark.parametrize(("half", "rest"), CAREFUL)
def test_cluster_waits_no_longer_than_the_lag(half: str, rest: str) -> None:
    pieces = play([(0.0, "Hi " + half), (2.0, rest)])
    assert (
        joined([piece for piece in pieces if piece[0] <= MAX_LAG + CLOSE])
        == "Hi " + half
    )


@pytest.mark.parametrize("last", ["n", "é", "7", ".", " ", "中", "の", "글", "ж"])
def test_ordinary_letters_do_not_wait(last: str) -> None:
    pieces = play([(0.0, "Hi " + last), (3.0, "x")])
    assert joined([piece for piece in pieces if piece[0] < 0.2]) == "Hi " + last


@pytest.mark.parametrize(
    "cluster", ["\n", "\r", "\r\n", "e\u0301", "\xa9\ufe0f", "\U0001f1e8\U0001f1f3"]
)
def test_clusters_of_one_text_are_neither_torn_nor_tied(cluster: str) -> None:
    sizes = [len(text) for _, text in play([(0.0, cluster * 240)])]
    assert {size % len(cluster) for size in sizes} == {0}
    assert max(sizes) <= len(cluster) * 240 / 20 + 2


def test_blank_lines_are_not_torn() -> None:
    """NextChat, which shows thoughts as quotes, looks for them in each delta."""
    pieces = [text for _, text in play([(0.0, "One.\n\n" * 100)])]
    assert len(pieces) > 10
    assert not [text for text in pieces if text[0] == "\n" != text[1]]


def test_endless_cluster_is_cut() -> None:
    pieces = play([(0.0, "x"), (0.1, "e" + "\u0301" * 500)])
    assert max(len(text) for _, text in pieces) < 70


def test_first_text_goes_even_if_it_may_grow() -> None:
    pacer = Pacer()
    pacer.push(WOMAN, 0.0)
    assert pacer.take(0.0) == WOMAN


@pytest.mark.parametrize("gap_s", [0.05, 0.45])
def test_flags_stay_whole_after_half_a_flag(gap_s: float) -> None:
    flags = "\U0001f1e8\U0001f1f3" * 20
    halves = [(at * gap_s / 2, half) for at, half in enumerate(flags)]
    first, *rest = play(halves)
    assert joined([first, *rest]) == flags
    assert len(first[1]) == 1  # the first text goes at once
    ends = list(accumulate(len(text) for _, text in [first, *rest]))
    assert all(end % 2 == 0 for end in ends[1:])


def test_close_and_flush_end_the_wait() -> None:
    for end in ("close", "flush"):
        pacer = Pacer()
        pacer.push("a" + WOMAN, 0.0)
        assert pacer.take(0.0) == "a"
        if end == "flush":
            assert pacer.flush() == WOMAN
        else:
            pacer.close(0.01)
            assert take_next(pacer) == WOMAN
            assert pacer.next_due() is None


# Promises that hold for every source...

PLAIN = ["a", "b", " ", ".", "7", "é", "中", "。", "の", "글"]
CLUSTERS = [
    WOMAN + JOINER + LAPTOP,
    "\U0001f1e8\U0001f1f3",
    "\u270d\U0001f3fd",
    "\u2764\ufe0f" + JOINER + "\U0001f525",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "\u0e19\u0e49\u0e33",
    "\u0915\u094d\u0937\u093f",
    "\u0645\u064f",
    "\u1112\u1161\u11ab",
    "\r\n",
]


@st.composite
def sources(
    draw: Callable[..., int], alphabet: list[str], longest_gap_ms: int = 900
) -> tuple[Pieces, set[int]]:
    """A text over `alphabet`, cut anywhere, after any gaps; and where clusters end."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 40))
    mean = draw(st.sampled_from([1, 4, 30]))
    gap_ms = draw(st.sampled_from([0, 5, 40, 200, longest_gap_ms]))
    clusters = ["a", *rng.choices(alphabet, k=count * mean)]  # "a" may go at once
    text, borders = "".join(clusters), set(accumulate(map(len, clusters)))
    cuts = sorted({rng.randrange(1, len(text) + 1) for _ in range(count)} | {len(text)})
    seconds, start, arrivals = 100.0, 0, []
    for cut in cuts:
        arrivals.append((seconds, text[start:cut]))
        seconds, start = seconds + rng.uniform(0, gap_ms) / 1000, cut
    return arrivals, borders


Source = tuple[Pieces, set[int]]
late_timers = st.lists(st.sampled_from([0.0, 0.001, 0.004]), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(sources(PLAIN + CLUSTERS), late_timers)
def test_text_is_whole_never_early_and_within_the_bound(
    source: Source, lateness: list[float]
) -> None:
    arrivals, _ = source
    pieces = play(arrivals, lateness=lateness)
    assert joined(pieces) == joined(arrivals)
    held = lags(arrivals, pieces)
    assert min(held) >= 0
    assert max(held) <= MAX_LAG + max(lateness) + CLOSE
    assert pieces[0][0] == arrivals[0][0]


@settings(max_examples=40, deadline=None)
@given(sources(PLAIN), st.sampled_from([0.05, 0.2, 1.0]))
def test_bound_holds_for_other_bounds(source: Source, max_lag: float) -> None:
    arrivals, _ = source
    pieces = play(arrivals, max_lag)
    assert joined(pieces) == joined(arrivals)
    assert max(lags(arrivals, pieces)) <= max_lag + CLOSE


@settings(max_examples=80, deadline=None)
@given(sources(PLAIN + CLUSTERS, longest_gap_ms=300))
def test_no_cluster_is_torn_but_for_the_bound(source: Source) -> None:
    arrivals, borders = source
    came = [seconds for seconds, piece in arrivals for _ in piece]
    shown = 0
    for seconds, piece in play(arrivals):
        shown += len(piece)
        begin = max(border for border in borders | {0} if border <= shown)
        is_overdue = begin < shown and seconds + 0.06 > came[begin] + MAX_LAG
        assert begin == shown or is_overdue


@settings(max_examples=60, deadline=None)
@given(sources(PLAIN))
@example(([(at, "x") for at in (0, 0.87, 1.39, 2.24, 2.78, 2.85, 2.93)], set()))
def test_pieces_are_few_and_silences_short(source: Source) -> None:
    arrivals, _ = source
    pieces = play(arrivals)
    seconds = [at for at, _ in pieces]
    for index in range(50, len(seconds)):
        assert seconds[index] - seconds[index - 50] >= 1 - CLOSE
    came = [(at, len(text)) for at, text in arrivals]
    went = [(at, -len(text)) for at, text in pieces]
    held, since = 0, 0.0
    for at, size in sorted(came + went, key=lambda event: (event[0], -event[1])):
        assert held == 0 or at - since <= 0.15
        since = at if size < 0 or held == 0 else since
        held += size


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["push", "take", "wait", "flush"]), max_size=60))
def test_flush_anywhere_loses_and_repeats_nothing(actions: list[str]) -> None:
    pacer, now, pushed, shown = Pacer(), 0.0, "", ""
    for index, action in enumerate(actions):
        now += 0.03
        if action == "push":
            text = LONG[: index * 3 + 1] + WOMAN + JOINER
            pushed += text
            pacer.push(text, now)
            shown += pacer.take(now)
        elif action == "take":
            shown += pacer.take(now)
        elif action == "flush":
            shown += pacer.flush()
            assert (pacer.held, shown) == (0, pushed)
    assert shown + pacer.flush() == pushed
