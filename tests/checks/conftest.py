"""Every check leaves nothing behind: no thread, no descriptor, no child process."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest

from pccl.runtime import new_loop
from tests.support.control import descriptors


def children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(file.read().split())


@pytest.fixture(scope="session", autouse=True)
def _first_loop() -> None:
    """What the loop's library makes once for each process, a pipe for signals, is there before anybody counts."""
    new_loop().close()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = descriptors(), set(threading.enumerate()), children()
    yield
    deadline = time.monotonic() + 5.0
    while True:
        gc.collect()  # an exception's traceback may hold a socket
        left = [has - had for had, has in zip(before, (descriptors(), set(threading.enumerate()), children()), strict=True)]
        if not any(left) or time.monotonic() > deadline:
            break
    assert not any(left), f"left behind: {left}"
