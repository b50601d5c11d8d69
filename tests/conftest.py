"""Coroutine tests without a plug-in, strict about what they leave behind.

An `async def` test runs on a `VirtualClockLoop`; with `@pytest.mark.real_clock` on an
ordinary loop. It fails if tasks are still running at its end, if an exception reached
the loop instead of a caller, or if a coroutine, a socket or a file was forgotten (all
warnings are errors). Every test has 120 s of real time.

`openai_python("0.28.1")` gives the path of a Python that has that release of OpenAI's
client, for end-to-end tests with clients of several generations.
"""

from __future__ import annotations

import _thread
import asyncio
import functools
import gc
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Coroutine, Generator, Iterator
from pathlib import Path
from typing import Any, Callable, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Hypothesis reads this when it is imported: its examples belong to the other caches.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".cache/hypothesis"))

import clients  # noqa: E402
import hypothesis  # noqa: E402
from clock import VirtualClockLoop  # noqa: E402

# Real seconds for one test. It ends hangs, and nothing else: where several programs
# share the machine, some tests have needed more than 30.
TIME_LIMIT_S = 120

# Once that is over: real seconds for the clean-up, and for each further attempt.
CLEAN_UP_LIMIT_S = 5

# Turns of the loop that tasks get to notice the end of a test: a cancelled task needs
# one or two, a stream that was closed a few more.
LAST_TURNS = 10

TestLoop = asyncio.AbstractEventLoop


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks."""
    config.addinivalue_line("markers", "real_clock: run on a loop with the real clock")
    # A busy machine must not fail a property: only the time limit below counts.
    hypothesis.settings.register_profile("opendify", deadline=None)
    hypothesis.settings.load_profile("opendify")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Take what is in use behind a test out of garbage collection: it stays quick.

    What tests import and cache would else be searched behind each of those that follow.
    """
    done = yield
    gc.collect()
    gc.freeze()
    return done


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Let a report with half a surrogate pair reach the process that prints it."""
    data = yield
    if data is None:
        return None
    text = json.dumps(data, ensure_ascii=False, default=str)
    return json.loads(text.encode(errors="replace"))


# ------------------------------------------------------------------------------
# Coroutine tests
# ------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine test; leave all others to pytest."""
    real = pyfuncitem.get_closest_marker("real_clock") is not None
    make_loop = asyncio.new_event_loop if real else VirtualClockLoop
    function = pyfuncitem.obj
    _unwrap_hypothesis(function, make_loop)
    if not inspect.iscoroutinefunction(function):
        return None
    wanted = inspect.signature(function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    run_coroutine(function(**arguments), make_loop)
    return True


def _unwrap_hypothesis(function: Any, make_loop: Callable[[], TestLoop]) -> None:
    """Let `@given` call a coroutine test as a plain function."""
    handle = getattr(function, "hypothesis", None)
    inner = getattr(handle, "inner_test", None)
    if handle is None or inner is None or not inspect.iscoroutinefunction(inner):
        return

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> None:
        run_coroutine(inner(*args, **kwargs), make_loop)

    handle.inner_test = call


def run_coroutine(
    coroutine: Coroutine[Any, Any, Any],
    make_loop: Callable[[], TestLoop] = VirtualClockLoop,
) -> Any:
    """Run `coroutine` on a fresh loop and return what it returns.

    Raises:
        pytest.fail.Exception: tasks were left over, or an exception reached the loop.
    """
    loop = make_loop()
    errors: list[str] = []
    loop.set_exception_handler(lambda _, context: errors.append(_describe(context)))
    try:
        try:
            result = loop.run_until_complete(coroutine)
            left = loop.run_until_complete(_left_over())
        finally:
            loop.run_until_complete(_clean_up())
            gc.collect()
    finally:
        loop.close()
    if left or errors:
        pytest.fail("\n".join(left + errors), pytrace=False)
    return result


def _describe(context: dict[str, Any]) -> str:
    """Return one line for what the loop's exception handler was told."""
    error = context.get("exception")
    source = context.get("task") or context.get("future") or context.get("protocol")
    return f"error in the loop: {context['message']}: {error!r} ({source!r})"


def _others() -> set[asyncio.Task[Any]]:
    """Return all tasks of the loop but the running one."""
    return asyncio.all_tasks() - {asyncio.current_task()}


async def _left_over() -> list[str]:
    """Return one line for each task that does not end by itself."""
    for _ in range(LAST_TURNS):
        if not _others():
            break
        await asyncio.sleep(0)
    return [f"task left over: {task!r}" for task in _others()]


async def _clean_up() -> None:
    """Cancel what is left, so that its sockets are closed before the next test."""
    left = _others()
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
    await asyncio.sleep(0)


# ------------------------------------------------------------------------------
# Time limit
# ------------------------------------------------------------------------------


class _TimeIsUp(KeyboardInterrupt):
    """Raised inside a hanging test: the one kind that asyncio lets through."""


def _raise_time_is_up(*_: object) -> NoReturn:
    raise _TimeIsUp


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """End a test that takes too long."""
    expired = threading.Event()
    stop_timer = _start_timer(expired)
    try:
        return (yield)
    except KeyboardInterrupt as error:
        if expired.is_set() or isinstance(error, _TimeIsUp):
            pytest.fail(f"{item.name} took more than {TIME_LIMIT_S} s")
        raise
    finally:
        stop_timer()


def _start_timer(expired: threading.Event) -> Callable[[], None]:
    """Start the timer of one test and return what stops it."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _raise_time_is_up)
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S, CLEAN_UP_LIMIT_S)
        return _stop_alarm

    def interrupt() -> None:
        expired.set()
        _thread.interrupt_main()

    timer = threading.Timer(TIME_LIMIT_S, interrupt)
    timer.daemon = True
    timer.start()
    return timer.cancel


def _stop_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


# ------------------------------------------------------------------------------
# Ports
# ------------------------------------------------------------------------------


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that refuses all connections, and that no server can get meanwhile."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and never listens
        yield deaf.getsockname()[1]


# ------------------------------------------------------------------------------
# Older clients
# ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def openai_python() -> Callable[[str], str]:
    """Return a function: release of `openai` -> path of a Python that has it.

    Made on first use under `.cache/`; skips the test if that is impossible.
    """
    return functools.lru_cache(maxsize=None)(_openai_python_or_skip)


def _openai_python_or_skip(release: str) -> str:
    try:
        return str(clients.openai_python(release))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", b"") or b""
        reason = output.decode(errors="replace").strip()[-300:]
        pytest.skip(f"cannot install openai {release}: {error} {reason}")
