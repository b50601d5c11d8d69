"""A clock that jumps: coroutine tests that never wait and never hang.

`VirtualClockLoop().time()` starts at 0. When nothing is ready to run and nothing
is ready to read, the loop does not wait for its next timer: it moves its clock
there. A test that would wait for ever fails at once, with a `Deadlock`.

Loopback sockets may be used: the clock never jumps while data can be read, and it
gives bytes on their way a moment of real time first. Threads of the loop's executor
(name look-ups) are waited for in real time.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import Any, Callable

# What the kernel may need to carry bytes over loopback, in real seconds. Only loops
# that hold sockets of their own pay it, once for each jump.
GRACE_S = 0.002

# How long a loop with sockets may stay idle, without any timer, before that counts as
# a deadlock, in real seconds: another process may be about to answer.
PATIENCE_S = 5.0

# Every selector loop holds one descriptor of its own, to be woken by threads.
OWN_DESCRIPTORS = 1


class Deadlock(RuntimeError):
    """Nothing is scheduled and nothing can be read: the test would hang."""


class JumpingSelector(selectors.DefaultSelector):
    """A selector that moves the clock instead of waiting."""

    now = 0.0
    busy_threads = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Return what is ready; if nothing is, jump to the end of the wait."""
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        ready = super().select(self._real_wait(timeout))
        if ready:
            return ready
        if timeout is None:
            raise Deadlock("nothing scheduled, nothing to read")
        self.now += timeout
        return ready

    def _real_wait(self, timeout: float | None) -> float | None:
        """Return the real seconds to wait before the clock may jump."""
        if self.busy_threads:
            return None
        if len(self.get_map()) <= OWN_DESCRIPTORS:
            return 0
        return PATIENCE_S if timeout is None else GRACE_S


def now() -> float:
    """Return the time of the running loop, in seconds."""
    return asyncio.get_running_loop().time()


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is virtual; see the module's docstring."""

    def __init__(self) -> None:
        """Start at time 0."""
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self.jumping.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run `func` in a thread; the clock stands still until it has ended."""
        future = super().run_in_executor(executor, func, *args)
        self.jumping.busy_threads += 1
        future.add_done_callback(self._thread_ended)
        return future

    async def shutdown_default_executor(self, *args: Any) -> None:
        """Wait for the executor's threads, in real time."""
        self.jumping.busy_threads += 1
        try:
            await super().shutdown_default_executor(*args)
        finally:
            self.jumping.busy_threads -= 1

    def _thread_ended(self, _: asyncio.Future[Any]) -> None:
        """Let the clock jump again."""
        self.jumping.busy_threads -= 1
