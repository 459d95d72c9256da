"""What every control channel does: the same tests over memory and over ZeroMQ."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvloop

from pccl.core.codec import MAX_MESSAGE
from pccl.core.errors import ConnectError, InvalidArgument
from pccl.transports import fork
from pccl.transports.base import Origin
from tests.support.control import NETS, ClientLog, Net, ServerLog, ZmqNet, nothing_left


@pytest.fixture(params=NETS)
async def net(request: pytest.FixtureRequest) -> AsyncIterator[Net]:
    made = NETS[request.param]()
    yield made
    await made.close()


async def test_echo(net: Net) -> None:
    served = ServerLog(lambda origin, data: server.send(origin, data.upper()))
    server, address = await net.serve(served)
    heard = ClientLog()
    client = await net.connect(address, heard)
    assert heard.events == []  # never from inside start
    await heard.wait("up")
    client.send(b"hello")
    assert served.events == []  # never from inside send
    await heard.wait("received")
    assert heard.events == [("up",), ("received", b"HELLO")]
    ((_, origin, data),) = served.events
    assert data == b"hello"
    assert isinstance(origin, Origin)
    assert origin.host


async def test_a_message_sent_on_coming_up_arrives(net: Net) -> None:
    class Eager(ClientLog):
        def control_up(self) -> None:
            super().control_up()
            client.send(b"hello")

    served = ServerLog()
    _, address = await net.serve(served)
    client = await net.connect(address, Eager())
    await served.wait("received")
    assert served.messages == [b"hello"]


async def test_order_is_kept_both_ways(net: Net) -> None:
    messages = [b"%d" % i for i in range(10_000)]
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    for message in messages:
        client.send(message)
    await served.until(lambda: len(served.events) == len(messages))
    assert served.messages == messages
    origin = served.events[0][1]
    for message in messages:
        server.send(origin, message)
    await heard.until(lambda: len(heard.events) == 1 + len(messages))
    assert heard.messages == messages


async def test_many_clients_each_get_their_own(net: Net) -> None:
    served = ServerLog(lambda origin, data: server.send(origin, data))
    server, address = await net.serve(served)
    logs = [ClientLog() for _ in range(30)]
    clients = [await net.connect(address, log) for log in logs]
    for i, (client, log) in enumerate(zip(clients, logs, strict=True)):
        await log.wait("up")
        client.send(b"%d" % i)
    for i, log in enumerate(logs):
        await log.wait("received")
        assert log.messages == [b"%d" % i]
    assert len({event[1] for event in served.events}) == len(logs)


async def test_the_longest_message_passes_and_a_longer_one_is_refused(net: Net) -> None:
    longest = b"x" * MAX_MESSAGE
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    client.send(longest)
    _, origin, data = await served.wait("received")
    assert data == longest
    server.send(origin, longest)
    await heard.wait("received")
    for send in (lambda: client.send(longest + b"x"), lambda: server.send(origin, longest + b"x")):
        with pytest.raises(InvalidArgument, match="16777217 bytes"):
            send()
    client.send(b"still there")
    await served.wait("received", 2)
    assert heard.messages == [longest]
    assert served.messages == [longest, b"still there"]


async def test_whatever_the_bytes_are_they_are_delivered(net: Net) -> None:
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    odd = [b"", b"\x00", b"\xff" * 300, b"\x04PING\x00\x00", bytes(range(256))]
    for data in odd:
        client.send(data)
    _, origin, _ = await served.wait("received", len(odd))
    for data in odd:
        server.send(origin, data)
    await heard.wait("received", len(odd))
    assert served.messages == heard.messages == odd


async def test_a_client_that_closes_is_disconnected(net: Net) -> None:
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    for i in range(100):
        client.send(b"%d" % i)
    await client.close()
    await served.wait("disconnected")
    origin = served.events[0][1]
    assert served.events == [*[("received", origin, b"%d" % i) for i in range(100)], ("disconnected", origin)]
    server.send(origin, b"anyone there?")
    assert heard.events == [("up",)]  # a close of its own is no news


async def test_a_connection_is_a_new_origin_each_time(net: Net) -> None:
    served = ServerLog()
    _, address = await net.serve(served)
    for i in range(5):
        heard = ClientLog()
        client = await net.connect(address, heard)
        await heard.wait("up")
        client.send(b"hello")
        await served.wait("received", i + 1)
        await client.close()
        await served.wait("disconnected", i + 1)
    origins = [event[1] for event in served.named("received")]
    assert len(set(origins)) == 5
    assert [event[1] for event in served.named("disconnected")] == origins


async def test_a_server_that_comes_back_is_found_again(net: Net) -> None:
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    client.send(b"before")
    _, origin, _ = await served.wait("received")
    server.send(origin, b"old")
    await server.close()
    await heard.wait("down")
    client.send(b"between")  # dropped
    served2 = ServerLog(lambda origin, data: server2.send(origin, b"new"))
    server2, address2 = await net.serve(served2, at=address)
    assert address2 == address
    asked = asyncio.get_running_loop().time()
    await heard.wait("up", 2)
    assert asyncio.get_running_loop().time() - asked < 0.4  # 0.3 promised
    client.send(b"after")
    await heard.until(lambda: b"new" in heard.messages)
    assert [event[0] for event in heard.events] == ["up", "received", "down", "up", "received"]
    assert heard.messages == [b"old", b"new"]
    assert served2.messages == [b"after"]
    server2.send(origin, b"stale")  # of a connection that is no more
    client.send(b"end")
    await served2.wait("received", 2)
    assert heard.messages[:2] == [b"old", b"new"]
    assert b"stale" not in heard.messages


async def test_nothing_of_an_old_connection_comes_after_the_new_one_is_up(net: Net) -> None:
    """Each of several servers goes while its messages are under way."""
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    for attempt in range(1, 6):
        await heard.wait("up", attempt)
        client.send(b"hello")
        _, origin, _ = await served.wait("received")
        for i in range(500):
            server.send(origin, b"%d:%d" % (attempt, i))
        await server.close()
        served = ServerLog()
        server, _ = await net.serve(served, at=address)
    await heard.wait("up", 6)
    ups = 0
    for event in heard.events:
        ups += event == ("up",)
        assert event[0] != "received" or event[1].startswith(b"%d:" % ups)


async def test_a_client_may_come_before_its_server(net: Net) -> None:
    earlier, address = await net.serve(ServerLog())
    await earlier.close()
    served, heard = ServerLog(), ClientLog()
    client = await net.connect(address, heard)
    await net.serve(served, at=address)
    await heard.wait("up")
    client.send(b"hello")
    await served.wait("received")
    assert heard.events == [("up",)]  # no "down", no "refused" before


async def test_an_address_has_one_server(net: Net) -> None:
    _, address = await net.serve(ServerLog())
    with pytest.raises(ConnectError, match="in use"):
        await net.serve(ServerLog(), at=address)


async def test_the_server_can_cut_a_connection(net: Net) -> None:
    served, heard = ServerLog(), ClientLog()
    server, address = await net.serve(served)
    client = await net.connect(address, heard)
    await heard.wait("up")
    client.send(b"hello")
    _, origin, _ = await served.wait("received")
    server.cut(origin)
    await served.wait("disconnected")
    await heard.wait("up", 2)  # an honest client comes back
    client.send(b"again")
    await served.wait("received", 2)
    assert [event[0] for event in heard.events] == ["up", "down", "up"]
    assert served.named("received")[1][1] != origin


async def test_closing_twice_or_unstarted_is_nothing(net: Net) -> None:
    server, address = await net.serve(ServerLog())
    client = await net.connect(address, ClientLog())
    for one in (client, server, net.make_server(""), net.make_client(address)):
        await one.close()
        await one.close()
    client.send(b"into the void")


@pytest.mark.parametrize("kind", NETS)
async def test_nothing_is_left_after_closing(kind: str) -> None:
    async def use() -> None:
        net = NETS[kind]()
        served, heard = ServerLog(), ClientLog()
        server, address = await net.serve(served)
        client = await net.connect(address, heard)
        lonely = await net.connect(address, ClientLog())
        await heard.wait("up")
        client.send(b"hello")
        _, origin, _ = await served.wait("received")
        server.send(origin, b"hello")
        await lonely.close()
        await server.close()
        await heard.wait("down")
        await client.close()

    await use()  # what libraries keep for good, they keep after the first time
    with nothing_left():
        await use()
    assert not fork._guarded


UVLOOP = [
    test_echo,
    test_order_is_kept_both_ways,
    test_the_longest_message_passes_and_a_longer_one_is_refused,
    test_a_client_that_closes_is_disconnected,
    test_a_server_that_comes_back_is_found_again,
    test_the_server_can_cut_a_connection,
]


@pytest.mark.parametrize("scenario", UVLOOP, ids=lambda scenario: scenario.__name__)
def test_on_uvloop(scenario: object) -> None:
    async def run() -> None:
        net = ZmqNet()
        try:
            await scenario(net)  # type: ignore[operator]
        finally:
            await net.close()

    uvloop.run(run())
