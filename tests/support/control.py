"""Handlers that write down what they hear, networks to make control channels in, and a check that nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pccl.core.address import Address, parse_address
from pccl.transports.base import ControlClient, ControlServer, Origin
from pccl.transports.keys import KeyPair, new_keypair
from pccl.transports.memory_control import MemoryControl
from pccl.transports.zmq import ZmqClient, ZmqServer


class Log:
    """Events in their order, and a way to wait for them."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self._news = asyncio.Event()

    def add(self, *event: Any) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, condition: Callable[[], Any], timeout: float = 10.0) -> Any:
        """Wait until something is true that only events change; returns it."""
        try:
            async with asyncio.timeout(timeout):
                while not (found := condition()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"not within {timeout} s; the last events are {self.events[-5:]}") from None
        return found

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == name]

    async def wait(self, name: str, count: int = 1, timeout: float = 10.0) -> tuple[Any, ...]:
        """The count-th event of this name, when it has happened."""
        return (await self.until(lambda: self.named(name)[count - 1 : count], timeout))[0]


class ServerLog(Log):
    """A master's shell."""

    def __init__(self, on_message: Callable[[Origin, bytes], None] | None = None) -> None:
        super().__init__()
        self._on_message = on_message

    def received(self, origin: Origin, data: bytes) -> None:
        if self._on_message is not None:
            self._on_message(origin, data)
        self.add("received", origin, data)

    def disconnected(self, origin: Origin) -> None:
        self.add("disconnected", origin)

    @property
    def messages(self) -> list[bytes]:
        return [event[2] for event in self.named("received")]


class ClientLog(Log):
    """A peer's engine."""

    def control_up(self) -> None:
        self.add("up")

    def control_received(self, data: bytes) -> None:
        self.add("received", data)

    def control_down(self) -> None:
        self.add("down")

    def control_refused(self, error: Exception) -> None:
        self.add("refused", error)

    @property
    def messages(self) -> list[bytes]:
        return [event[1] for event in self.named("received")]


class Net:
    """Where servers and clients of one kind are made; all that were are closed with it."""

    def __init__(self) -> None:
        self._all: list[ControlServer | ControlClient] = []

    async def serve(self, log: ServerLog, at: str = "") -> tuple[ControlServer, str]:
        """A server that has started, and its address."""
        server = self.make_server(at)
        self._all.append(server)
        return server, await server.start(log)

    async def connect(self, address: str, log: ClientLog) -> ControlClient:
        """A client that has started."""
        client = self.make_client(address)
        self._all.append(client)
        await client.start(log)
        return client

    async def close(self) -> None:
        for one in reversed(self._all):
            await one.close()

    def make_server(self, at: str) -> ControlServer:
        raise NotImplementedError

    def make_client(self, address: str) -> ControlClient:
        raise NotImplementedError


class MemoryNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryControl()

    def make_server(self, at: str) -> ControlServer:
        return self.network.server(at or "master:1")

    def make_client(self, address: str) -> ControlClient:
        return self.network.client(address)


class ZmqNet(Net):
    def __init__(self, keypair: KeyPair | None = None) -> None:
        super().__init__()
        self.keypair = keypair

    def make_server(self, at: str) -> ControlServer:
        address = parse_address(at) if at else Address("127.0.0.1", 0)
        return ZmqServer(address, keypair=self.keypair)

    def make_client(self, address: str) -> ControlClient:
        return ZmqClient(parse_address(address))


NETS: dict[str, Callable[[], Net]] = {"memory": MemoryNet, "zmq": ZmqNet, "zmq-curve": lambda: ZmqNet(new_keypair())}


def descriptors() -> set[tuple[int, str]]:
    """Open descriptors, with what they are open on."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the one for the listing itself
            continue
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fails if descriptors, threads or tasks are there afterwards that were not before."""

    def state() -> tuple[set[Any], ...]:
        return descriptors(), set(threading.enumerate()), set(os.listdir("/proc/self/task")), asyncio.all_tasks()

    before = state()
    yield
    deadline = time.monotonic() + 1.0  # the kernel takes a moment to bury a thread that was joined
    while not set(os.listdir("/proc/self/task")) <= before[2] and time.monotonic() < deadline:
        os.sched_yield()
    for what, had, has in zip(("descriptors", "threads", "kernel threads", "tasks"), before, state(), strict=True):
        assert has <= had, f"{what} left: {has - had}"
