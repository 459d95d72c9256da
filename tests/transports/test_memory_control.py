"""The control channel in memory: its faults, in virtual time."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import pytest

from pccl.transports.memory_control import MemoryClient, MemoryControl, MemoryServer
from tests.support.control import ClientLog, ServerLog

MASTER = "master:1"
TIMEOUT = 3.0
NOTICED = TIMEOUT + 0.5  # the latest, by the heartbeat interval


class Idle(selectors.DefaultSelector):
    """Does not wait: time jumps to what is next."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "nothing will ever happen again"
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.idle = Idle()
        super().__init__(self.idle)

    def time(self) -> float:
        return self.idle.now


def virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in virtual time."""

    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test())

    run.__name__ = test.__name__
    return run


class World:
    """A server that echoes, and clients; every event with the time it had."""

    def __init__(self, **options: Any) -> None:
        self.network = MemoryControl(heartbeat_timeout=TIMEOUT, **options)
        self.served = ServerLog(lambda origin, data: self.server.send(origin, data))
        self.logs: dict[str, ClientLog] = {}
        self.clients: dict[str, MemoryClient] = {}

    async def start(self, clients: Iterable[str] = ("a",)) -> None:
        await self.serve()
        for name in clients:
            self.logs[name] = ClientLog()
            self.clients[name] = self.network.client(MASTER, name)
            await self.clients[name].start(self.logs[name])
        for name in clients:
            await self.logs[name].wait("up")
            self.clients[name].send(b"hello")
            await self.logs[name].wait("received")

    async def serve(self) -> MemoryServer:
        self.server = self.network.server(MASTER)
        await self.server.start(self.served)
        return self.server

    async def echo(self, name: str, data: bytes) -> None:
        self.clients[name].send(data)
        await self.logs[name].until(lambda: data in self.logs[name].messages, timeout=60)


def now() -> float:
    return asyncio.get_running_loop().time()


async def after(seconds: float) -> None:
    await asyncio.sleep(seconds)


@virtual
async def test_frames_take_their_time_and_keep_their_order() -> None:
    delays = iter([0.1, 0.1, 0.5, 0.2, 0.0, 0.3] + [0.0] * 100)
    world = World()
    await world.start()
    world.network._delay = lambda source, target: next(delays) if source == "a" else 0.0
    start = now()
    arrived: list[tuple[float, bytes]] = []
    world.served._on_message = lambda origin, data: arrived.append((round(now() - start, 3), data))
    for i in range(6):
        world.clients["a"].send(b"%d" % i)
    await world.served.wait("received", 7)
    assert arrived == [(0.1, b"0"), (0.1, b"1"), (0.5, b"2"), (0.5, b"3"), (0.5, b"4"), (0.5, b"5")]


@virtual
async def test_what_is_lost_now_and_then_arrives_late() -> None:
    lost = iter([None, None, 0.0, None, 0.0] + [0.0] * 100)
    world = World()
    await world.start()
    world.network._delay = lambda source, target: next(lost)
    await world.echo("a", b"one")
    await world.echo("a", b"two")
    assert world.logs["a"].messages == [b"hello", b"one", b"two"]
    assert not world.served.named("disconnected")


@virtual
async def test_a_killed_client_is_noticed_soon_and_hears_no_more() -> None:
    world = World(delay=lambda source, target: 0.01)
    await world.start(["a", "b"])
    start = now()
    world.network.kill("a")
    await world.served.wait("disconnected")
    assert now() - start == pytest.approx(0.01)
    world.clients["a"].send(b"from the grave")
    await world.echo("b", b"still here")
    await after(10)
    assert world.logs["a"].events == [("up",), ("received", b"hello")]
    assert b"from the grave" not in world.served.messages


@virtual
async def test_a_frozen_client_is_lost_and_comes_back_as_another() -> None:
    world = World()
    await world.start()
    origin = world.served.events[0][1]
    start = now()
    world.network.freeze("a")
    world.clients["a"].send(b"into the ice")
    world.server.send(origin, b"unheard for now")
    await world.served.wait("disconnected")
    assert TIMEOUT <= now() - start <= NOTICED
    heard = list(world.logs["a"].events)
    await after(5)
    assert world.logs["a"].events == heard
    world.network.release("a")
    await world.logs["a"].wait("up", 2)
    assert [event[0] for event in world.logs["a"].events] == ["up", "received", "received", "down", "up"]
    await world.echo("a", b"again")
    assert world.served.events[-1][1] != origin
    assert b"into the ice" not in world.served.messages


@virtual
async def test_a_short_freeze_loses_nothing() -> None:
    world = World()
    await world.start()
    world.network.freeze("a")
    world.clients["a"].send(b"later")
    await after(TIMEOUT - 1)
    assert b"later" not in world.served.messages
    world.network.release("a")
    await world.logs["a"].wait("received", 2)
    await after(10)
    assert [event[0] for event in world.logs["a"].events] == ["up", "received", "received"]


@virtual
async def test_a_held_client_stays_connected() -> None:
    world = World()
    await world.start()
    world.network.hold("a")
    world.clients["a"].send(b"held")
    await after(10 * TIMEOUT)
    assert world.served.messages == [b"hello"]
    assert not world.served.named("disconnected")
    world.network.release("a")
    await world.logs["a"].wait("received", 2)
    assert world.logs["a"].messages == [b"hello", b"held"]


@virtual
async def test_a_client_killed_while_held_never_sends_what_it_held() -> None:
    world = World()
    await world.start()
    world.network.hold("a")
    world.clients["a"].send(b"held")
    world.network.kill("a")
    await world.served.wait("disconnected")
    assert world.served.messages == [b"hello"]


@virtual
async def test_a_killed_server_and_its_successor() -> None:
    world = World()
    await world.start(["a", "b"])
    world.network.kill(MASTER)
    for name in "ab":
        await world.logs[name].wait("down")
        world.clients[name].send(b"nobody there")
    assert world.served.named("disconnected") == []
    await after(20)
    await world.serve()
    for name in "ab":
        await world.logs[name].wait("up", 2)
        await world.echo(name, name.encode())
    assert b"nobody there" not in world.served.messages
    assert len({event[1] for event in world.served.named("received")}) == 4


@virtual
async def test_a_frozen_server_loses_its_clients() -> None:
    world = World()
    await world.start()
    start = now()
    world.network.freeze(MASTER)
    await world.logs["a"].wait("down")
    assert TIMEOUT <= now() - start <= NOTICED
    await after(5)
    assert len(world.logs["a"].named("up")) == 1
    world.network.release(MASTER)
    await world.logs["a"].wait("up", 2)
    await world.served.wait("disconnected")


@virtual
async def test_a_cut_is_noticed_by_both_and_mends() -> None:
    world = World()
    await world.start(["a", "b"])
    start = now()
    world.network.cut("a", MASTER)
    world.clients["a"].send(b"into the void")
    await world.served.wait("disconnected")
    await world.logs["a"].wait("down")
    assert TIMEOUT <= now() - start <= NOTICED
    await world.echo("b", b"still here")
    assert not world.logs["b"].named("down")
    await after(10)
    world.network.mend("a", MASTER)
    await world.logs["a"].wait("up", 2)
    await world.echo("a", b"back")
    assert b"into the void" not in world.served.messages


@virtual
async def test_a_short_cut_only_delays() -> None:
    world = World()
    await world.start()
    world.network.cut("a", MASTER)
    world.clients["a"].send(b"late")
    await after(TIMEOUT - 1)
    world.network.mend(MASTER, "a")
    await world.logs["a"].wait("received", 2)
    await after(10)
    assert not world.logs["a"].named("down")
    assert not world.served.named("disconnected")


@virtual
async def test_one_direction_may_be_cut() -> None:
    world = World()
    await world.start()
    start = now()
    world.network.cut("a", MASTER, both=False)
    await world.served.wait("disconnected")
    assert TIMEOUT <= now() - start <= NOTICED
    await world.logs["a"].wait("down")  # the server's goodbye gets through
    assert now() - start <= NOTICED
    await after(5)
    assert len(world.logs["a"].named("up")) == 1  # a connection needs both ways


@virtual
async def test_a_dead_network_comes_to_rest() -> None:
    world = World()
    await world.start(["a", "b"])
    world.network.cut("a", MASTER)
    for name in ("a", "b", MASTER):
        world.network.kill(name)
    await after(10)
    loop = asyncio.get_running_loop()
    assert not loop._scheduled  # type: ignore[attr-defined]


def test_a_run_repeats_exactly() -> None:
    def trace() -> list[Any]:
        events: list[Any] = []

        async def run() -> None:
            world = World(delay=lambda source, target: 0.01 + len(source) % 3 / 100)
            names = [f"{'x' * (i % 5)}{i}" for i in range(8)]
            await world.start(names)
            world.network.cut(names[0], MASTER)
            world.network.freeze(names[1])
            world.network.kill(names[2])
            await after(4)
            world.network.kill(MASTER)
            await after(1)
            await world.serve()
            world.network.release(names[1])
            world.network.mend(names[0], MASTER)
            await after(5)
            for name in names:
                events.extend((name, *event) for event in world.logs[name].events)
            events.extend(world.served.events)
            events.append(now())

        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(run())
        return events

    first = trace()
    assert first == trace()
    assert len(first) > 40
