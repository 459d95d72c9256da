"""What ties a process of the run to its driver: it hears words through stdin, and never outlives the driver, not even if it is stopped."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def on_leash(on_word: Callable[[], object]) -> None:
    """Call this for every word of the driver, in a thread; end with the driver."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # reaches those that are stopped, too
    except (OSError, AttributeError):
        pass  # not Linux: the end of stdin has to do
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_listen, args=(on_word,), name="driver", daemon=True).start()


def _listen(on_word: Callable[[], object]) -> None:
    while os.read(0, 4096):  # not sys.stdin: Python cannot shut down while a thread reads that
        on_word()
    os._exit(1)
