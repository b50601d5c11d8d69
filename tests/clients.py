"""Older releases of OpenAI's client, each in an environment of its own.

python tests/clients.py        # make them all, before the tests need them
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The last one before the rewrite, and the last of the first line after it. The newest
# is installed beside the tests.
OPENAI_RELEASES = ("0.28.1", "1.109.1")

INSTALL_LIMIT_S = 600


def openai_python(release: str) -> Path:
    """Return a Python that has this release of `openai`, made on first use.

    Raises:
        OSError: the environment cannot be made.
        subprocess.SubprocessError: pip failed; its `stderr` tells why.
    """
    version = ".".join(str(part) for part in sys.version_info[:2])
    home = ROOT / ".cache" / "clients" / f"openai-{release}-py{version}"
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = home / "complete"
    if not done.exists():
        venv.create(home, clear=True, with_pip=True)
        requirements = ROOT / ".ci" / f"openai-{release}.txt"
        install = ["-m", "pip", "install", "-q", "-r", str(requirements)]
        subprocess.run(
            [str(python), *install],
            check=True,
            capture_output=True,
            timeout=INSTALL_LIMIT_S,
        )
        done.touch()
    return python


if __name__ == "__main__":
    for wanted in OPENAI_RELEASES:
        print(openai_python(wanted))
