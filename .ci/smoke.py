"""Run the one file as a user would: alone, with its two dependencies and no settings.

python .ci/smoke.py                   # --version; --demo, one request, stop
python .ci/smoke.py --dependencies    # what the file says it needs, one a line
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parent.parent / "opendify.py"
START_LIMIT_S = 60
STOP_LIMIT_S = 60


def dependencies() -> list[str]:
    """Return the dependencies of the file's PEP 723 block."""
    text = SOURCE.read_text(encoding="utf-8")
    found = re.search(r"(?m)^# dependencies = (\[.*\])$", text)
    assert found, "no line `# dependencies = [...]`"
    names: list[str] = json.loads(found.group(1))
    return names


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def fetch(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON answer of a local server."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer any"}
    request = urllib.request.Request(url, data, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=START_LIMIT_S) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def fetch_when_up(url: str, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Return the first answer of a server that is starting."""
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        assert server.poll() is None, f"it ended with status {server.returncode}"
        try:
            return fetch(url)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def smoke(folder: Path) -> None:
    """Ask the file for its version, and its demo app for an answer."""
    program = [sys.executable, str(shutil.copy(SOURCE, folder))]
    kept = ("PATH", "SYSTEMROOT", "LANG", "TMPDIR", "TEMP")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    options: dict[str, Any] = {"cwd": folder, "env": environment}
    version = subprocess.run([*program, "--version"], check=True, **options)
    assert version.returncode == 0
    port = free_port()
    demo = [*program, "--demo", "--port", str(port)]
    with subprocess.Popen(demo, **options) as server:
        try:
            base = f"http://127.0.0.1:{port}/v1"
            model = fetch_when_up(f"{base}/models", server)["data"][0]["id"]
            messages = [{"role": "user", "content": "Hello"}]
            body = {"model": model, "messages": messages}
            answer = fetch(f"{base}/chat/completions", body)
            text = answer["choices"][0]["message"]["content"]
            assert text, f"an empty answer: {answer}"
            print(f"{model}: {text[:60]!r}")
            server.send_signal(signal.SIGTERM)
            status = server.wait(STOP_LIMIT_S)
            assert status == 0, f"it stopped with status {status}"
        finally:
            server.kill()


if __name__ == "__main__":
    if sys.argv[1:] == ["--dependencies"]:
        print("\n".join(dependencies()))
    else:
        with tempfile.TemporaryDirectory() as directory:
            smoke(Path(directory))
