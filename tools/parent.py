"""The process that has started this one: what it says to this one, and what it is told. This one never outlives it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1


class Parent:
    """Takes stdin and stdout for this; what else is written to stdout goes to stderr.

    Args:
        on_word: called with each line of stdin, in a thread.
    """

    def __init__(self, on_word: Callable[[str], object]) -> None:
        self._on_word = on_word
        parent = os.getppid()
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches those that are stopped, too
        except (OSError, AttributeError):
            pass  # not Linux: the end of stdin has to do
        if os.getppid() != parent:
            os._exit(1)
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        threading.Thread(target=self._listen, name="parent", daemon=True).start()

    def tell(self, event: str, **facts: Any) -> None:
        """Say something: one JSON object per line."""
        self._out.write(json.dumps({"event": event, "at": time.monotonic(), **facts}) + "\n")
        self._out.flush()

    def _listen(self) -> None:
        rest = b""
        try:
            while data := os.read(0, 1 << 16):  # not sys.stdin: Python cannot shut down while a thread reads that
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._on_word(line.decode())
        finally:
            os._exit(1)
