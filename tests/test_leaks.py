"""Each of the leak checks finds a leak, and names it."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

LEAKY = """
import asyncio, os, socket, subprocess, sys, threading
from tests.support import leaks

leaks.PATIENCE = 0.5
kept = []

async def idle():
    await asyncio.Event().wait()

async def ends_soon(go):
    await go.wait()

async def test_task():
    kept.append(asyncio.create_task(idle(), name="forgotten task"))

def test_thread():
    event = threading.Event()
    thread = threading.Thread(target=event.wait, name="forgotten thread", daemon=True)
    thread.start()
    kept.append(event)

def test_pipe():
    kept.append(os.pipe())

async def test_listener():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    kept.append(sock)

def test_child():
    kept.append(subprocess.Popen([sys.executable, "-c", "input()", "forgotten child"], stdin=subprocess.PIPE))

def test_zombie_of_a_thread():
    def start():
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        kept.append(child)
        started.set()
        never.wait()

    started, never = threading.Event(), threading.Event()
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    started.wait()
    kept.append(thread)

def test_clean():
    thread = threading.Thread(target=threading.Event().wait, args=(0.001,))
    thread.start()
    with socket.socket():
        subprocess.run([sys.executable, "-c", ""], check=True)

async def test_clean_task():
    go = asyncio.Event()
    kept.append(asyncio.create_task(ends_soon(go)))
    await asyncio.to_thread(int)
    asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, go.set)

def test_end():
    for child in kept:
        if isinstance(child, subprocess.Popen):
            child.communicate()
"""


def test_what_is_left_is_named(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> None:
    pytester.makepyfile(LEAKY)
    pytester.makeini(f"[pytest]\npythonpath = {pytestconfig.rootpath}\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    result = pytester.runpytest_subprocess("-p", "tests.support.leaks", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=9, errors=6)
    result.stdout.re_match_lines_random(
        [
            r"left behind: task 'forgotten task': idle at .*test_what_is_left_is_named\.py:\d+",
            r"left behind: thread 'forgotten thread'$",
            r"left behind: descriptor \d+: pipe:\[\d+\]; descriptor \d+: pipe:\[\d+\]$",
            r"left behind: descriptor \d+: socket:\[\d+\] AF_INET SOCK_STREAM at \('127\.0\.0\.1', \d+\)$",
            r"left behind: descriptor \d+: pipe:\[\d+\]; child process \d+: \S*python\S* -c input\(\) forgotten child$",
            r"left behind: thread 'Thread-\d+ \(start\)'; child process \d+: ended, and nobody has waited for it$",
        ]
    )
