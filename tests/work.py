"""Bounds on work: what must not take quadratic time, whatever the machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

LOOPS = 500_000


@contextlib.contextmanager
def at_most(passes: float) -> Iterator[None]:
    """Fail if what is done inside takes more CPU time than `passes` of a short loop.

    The loop runs before and behind it, and the slower run counts: a busy machine slows
    both down alike. What is tested takes a quarter of its bound, or less.
    """
    before_s = _pass_s()
    began = time.process_time()
    yield
    spent_s = time.process_time() - began
    took = spent_s / max(before_s, _pass_s())
    assert took < passes, f"it took {took:.0f} passes"


def _pass_s() -> float:
    began = time.process_time()
    for _ in range(LOOPS):
        pass
    return time.process_time() - began
