"""The programs that the tests start: what each is given of the environment."""

from __future__ import annotations

import os

# The last one is where Python keeps what it has compiled: there, if `.ci/run` says so,
# and clients that are large start in half the time.
KEPT = ("PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "HOME", "LANG", "PYTHONPYCACHEPREFIX")


def few_variables() -> dict[str, str]:
    """What a process needs: no setting, and nothing that changes what it does."""
    return {name: os.environ[name] for name in KEPT if name in os.environ}
