import ast
import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from pccl.transports import fork
from pccl.transports.base import Origin
from pccl.transports.zmq import ZmqServer
from tests.support.control import ServerLog
from tests.transports.test_zmq import peer_process, serving

pytestmark = pytest.mark.process


def in_child(look: Callable[[], object]) -> str:
    """What a function returns in a forked child, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, repr(look()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        found = file.read().decode()
    os.waitpid(child, 0)
    return found


def is_open(fd: int) -> bool:
    """Whether there is more behind a descriptor than /dev/null."""
    try:
        return not os.path.samestat(os.fstat(fd), os.stat(os.devnull))
    except OSError:
        return False


def test_a_child_gives_up_what_is_guarded_and_the_parent_keeps_it() -> None:
    one, other = socket.socketpair()
    with one, other:
        fork.guard(one.fileno())
        assert in_child(lambda: (is_open(one.fileno()), is_open(other.fileno()))) == "(False, True)"
        one.send(b"x")
        assert other.recv(1) == b"x"
        fork.unguard(one.fileno())
        assert in_child(lambda: is_open(one.fileno())) == "True"


def test_a_number_that_is_used_again_is_left_alone() -> None:
    one, other = socket.socketpair()
    fd = one.fileno()
    fork.guard(fd)
    one.close()
    os.dup2(other.fileno(), fd)
    other.close()
    assert in_child(lambda: is_open(fd)) == "True"
    os.close(fd)
    fork.unguard(fd)


def test_a_guarded_number_stays_taken_in_the_child() -> None:
    """So that an object of the parent's, collected in the child, closes nothing that the child has opened since."""
    one, other = socket.socketpair()
    with one, other:
        fork.guard(one.fileno())
        assert in_child(lambda: os.dup(other.fileno()) == one.fileno()) == "False"
        fork.unguard(one.fileno())


def test_what_is_closed_is_not_guarded() -> None:
    fork.guard(987)
    assert in_child(lambda: "alive") == "'alive'"


def test_callbacks_run_in_the_child_and_are_not_kept_alive(caplog: pytest.LogCaptureFixture) -> None:
    class Communicator:
        def __init__(self, name: str) -> None:
            self.name = name

        def forked(self) -> None:
            called.append(self.name)

    def fails() -> None:
        raise RuntimeError

    called: list[str] = []
    kept, gone = Communicator("kept"), Communicator("gone")
    fork.on_fork(gone.forked)
    fork.on_fork(fails)
    fork.on_fork(kept.forked)
    del gone
    gc.collect()
    assert in_child(lambda: called) == "['kept']"
    assert called == []


@asynccontextmanager
async def peer() -> AsyncIterator[tuple[ServerLog, ZmqServer, Origin, asyncio.subprocess.Process]]:
    served = ServerLog()
    async with serving(served) as (server, address), peer_process(address) as process:
        _, origin, _ = await served.wait("received")
        yield served, server, origin, process


async def test_a_killed_parent_is_noticed_though_its_child_lives() -> None:
    async with peer() as (served, server, origin, process):
        server.send(origin, b"fork")
        _, _, child = await served.wait("received", 2)
        process.kill()
        start = time.monotonic()
        assert await served.wait("disconnected") == ("disconnected", origin)
        assert time.monotonic() - start < 1.0
        os.kill(int(child), signal.SIGKILL)  # fails if it is not there


async def test_a_child_that_ends_disturbs_nothing() -> None:
    async with peer() as (served, server, origin, _):
        server.send(origin, b"fork_and_exit")
        assert (await served.wait("received", 2))[2] == b"7"
        for _ in range(3):
            server.send(origin, b"echo still here")
        await served.wait("received", 5)
        assert not served.named("disconnected")


async def test_a_child_has_no_descriptor_of_libzmq_that_matters() -> None:
    async with peer() as (served, server, origin, _):
        server.send(origin, b"fork_and_look")
        parent, child = ((await served.wait("received", 2))[2]).decode().split("|")
        had, has = ast.literal_eval(parent), ast.literal_eval(child)

        def count(found: set[tuple[int, str]], kind: str) -> int:
            return sum(kind in what for _, what in found)

        assert count(had, "socket:") - count(has, "socket:") == 1  # the connection; the loop's own pair is none of ours
        assert count(has, "[eventpoll]") == 2  # the loop's, and that of libzmq's reaper, which nothing leads to
        assert count(has, "[eventfd]") == 3  # the reaper's, the context's and the monitor's inner ones
        server.send(origin, b"echo still here")
        await served.wait("received", 3)


async def test_a_port_is_free_though_a_child_of_its_server_lives() -> None:
    read, write = os.pipe()
    ready, tell = os.pipe()
    async with serving(ServerLog()) as (_, address):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.write(tell, b"x")
            os.read(read, 1)
            os._exit(0)
        await asyncio.to_thread(os.read, ready, 1)
    try:
        async with serving(ServerLog(), address) as (_, again):
            assert again == address
    finally:
        for fd in (read, write, ready, tell):
            os.close(fd)
        await asyncio.to_thread(os.waitpid, child, 0)
