"""The control channel over ZeroMQ: who may connect, who is told what, and how the end of a peer is noticed."""

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from pccl.core.address import Address, key_text, parse_address
from pccl.core.errors import AuthenticationError, ConnectError, InvalidArgument
from pccl.transports import zmq_client, zmq_common, zmq_server
from pccl.transports.keys import KeyPair, new_keypair
from pccl.transports.zmq import ZmqClient, ZmqServer
from tests.support.control import ClientLog, Log, ServerLog

ROOT = Path(__file__).parents[2]
LOOPBACK = Address("127.0.0.1", 0)
TIMEOUT = 1.0  # of heartbeats, where a test waits for one


@asynccontextmanager
async def serving(log: ServerLog, address: Address = LOOPBACK, **options: Any) -> AsyncIterator[tuple[ZmqServer, Address]]:
    server = ZmqServer(address, **options)
    try:
        yield server, parse_address(await server.start(log))
    finally:
        await server.close()


@asynccontextmanager
async def connecting(log: ClientLog, address: Address, keypair: KeyPair | None = None, **options: Any) -> AsyncIterator[ZmqClient]:
    client = ZmqClient(address, keypair=keypair, **options)
    try:
        await client.start(log)
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def peer_process(address: Address) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.control_child", str(address), cwd=ROOT, stdin=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[Address]:
    """A TCP server that is none of ours."""
    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except OSError:
            pass

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in writers:
            writer.close()


@pytest.fixture
async def logged() -> AsyncIterator[Callable[[str], Any]]:
    """Waits until a text has been logged."""
    log = Log()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log.add(record.getMessage())

    handler = Handler()
    logging.getLogger("pccl").addHandler(handler)
    yield lambda text: log.until(lambda: any(text in event[0] for event in log.events))
    logging.getLogger("pccl").removeHandler(handler)


async def refusal(address: Address, keypair: KeyPair | None = None) -> str:
    """Why a client is refused; fails unless it is, once and for good."""
    log = ClientLog()
    async with connecting(log, address, keypair):
        _, error = await log.wait("refused")
        assert isinstance(error, AuthenticationError)
        assert len(log.events) == 1
        return str(error)


# --- keys


async def test_origins_carry_the_key_that_was_proved() -> None:
    master, peer = new_keypair(), new_keypair()
    served, heard = ServerLog(), ClientLog()
    async with serving(served, keypair=master) as (_, address), connecting(heard, address, peer) as client:
        assert address.key == master.public
        await heard.wait("up")
        client.send(b"hello")
        _, origin, _ = await served.wait("received")
        assert origin.key == key_text(peer.public)
        assert origin.host == "127.0.0.1"


async def test_a_key_that_is_not_allowed_is_refused(logged: Any) -> None:
    friend, stranger = new_keypair(), new_keypair()
    served = ServerLog()
    async with serving(served, keypair=new_keypair(), allowed=[friend.public]) as (_, address):
        text = await refusal(address, stranger)
        assert f"{address.host}:{address.port}" in text
        assert "not allowed" in text
        assert text.endswith(key_text(stranger.public))
        await logged(f"its key {key_text(stranger.public)} is not allowed")
        heard = ClientLog()
        async with connecting(heard, address, friend):
            await heard.wait("up")
    assert served.events == []


async def test_the_list_of_allowed_keys_may_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = new_keypair(), new_keypair()
    path = tmp_path / "allowed"
    path.write_text(f"{key_text(first.public)} first\n")
    async with serving(ServerLog(), keypair=new_keypair(), allowed=path) as (_, address):
        await refusal(address, second)
        path.write_text(f"{key_text(first.public)} first\n{key_text(second.public)} second\n")
        heard = ClientLog()
        async with connecting(heard, address, second):
            await heard.wait("up")
        path.write_text("rubbish")  # a mistake locks nobody out
        heard = ClientLog()
        async with connecting(heard, address, second):
            await heard.wait("up")
        assert "line 1" in caplog.text


async def test_an_address_without_the_key_is_refused() -> None:
    async with serving(ServerLog(), keypair=new_keypair()) as (_, address):
        text = await refusal(address._replace(key=None))
    assert "lacks the master's key" in text


async def test_an_address_with_a_key_is_refused_by_a_master_without() -> None:
    async with serving(ServerLog()) as (_, address):
        assert "the master runs without" in await refusal(address._replace(key=new_keypair().public))


async def test_an_address_with_another_key_is_refused(logged: Any) -> None:
    async with serving(ServerLog(), keypair=new_keypair()) as (_, address):
        assert "the key in the address is not the master's" in await refusal(address._replace(key=new_keypair().public))
        await logged("it used another key than this master's")


async def test_a_client_with_a_key_never_comes_up_in_plaintext() -> None:
    """Someone in between hangs up on the encrypted connection, and leads the next ones to a server without a key."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        if count == 1:
            writer.close()
        else:
            await forward(reader, writer, address)

    async with serving(ServerLog()) as (_, address), listening(serve) as between:
        assert "runs without" in await refusal(between._replace(key=new_keypair().public))
    assert count >= 2


async def test_without_a_key_only_loopback_is_served(caplog: pytest.LogCaptureFixture) -> None:
    for host in ("0.0.0.0", "*", "::", "192.0.2.1"):
        with pytest.raises(ConnectError, match=r"`pccl keys new`.*--key.*--insecure"):
            async with serving(ServerLog(), Address(host, 0)):
                pass
    async with serving(ServerLog(), Address("0.0.0.0", 0), insecure=True) as (_, address):
        assert address.host not in ("0.0.0.0", "127.0.0.1")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_a_list_of_allowed_keys_needs_a_key() -> None:
    with pytest.raises(InvalidArgument, match="allowed"):
        ZmqServer(LOOPBACK, allowed=[new_keypair().public])


# --- addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0", "*", "::"])
async def test_hosts_that_can_be_listened_on(host: str) -> None:
    heard = ClientLog()
    async with serving(ServerLog(), Address(host, 0), keypair=new_keypair()) as (_, address):
        assert address.port > 0
        assert address.host not in zmq_server.WILDCARDS
        local = {"::1": "::1", "::": "::1"}.get(host, "127.0.0.1")
        async with connecting(heard, address._replace(host=local)):
            await heard.wait("up")


async def test_a_name_is_connected_to() -> None:
    for host in {str(info[4][0]) for info in socket.getaddrinfo("localhost", None)}:
        heard = ClientLog()
        async with serving(ServerLog(), Address(host, 0)) as (_, address), connecting(heard, address._replace(host="localhost")):
            await heard.wait("up")


async def test_the_advertised_host_is_told() -> None:
    async with serving(ServerLog(), Address("0.0.0.0", 0), keypair=new_keypair(), advertise=("example.org", None)) as (_, address):
        assert address.host == "example.org"


async def test_addresses_that_cannot_be_listened_on() -> None:
    async with serving(ServerLog()) as (_, address):
        for bad, text in (
            (address._replace(key=None), rf"127\.0\.0\.1:{address.port}: port {address.port} is in use\. Stop what listens"),
            (Address("192.0.2.77", 0), "does not have that address"),
            (Address("no.such.host.invalid", 0), "name is not known"),
        ):
            with pytest.raises(ConnectError, match=text):
                async with serving(ServerLog(), bad, insecure=True):
                    pass


async def test_what_is_no_address_is_refused() -> None:
    heard = ClientLog()
    async with connecting(heard, Address("no host", 1)):
        _, error = await heard.wait("refused")
        assert type(error) is ConnectError


# --- the ends of peers


@pytest.mark.process
async def test_a_killed_process_is_noticed_at_once() -> None:
    served = ServerLog()
    async with serving(served) as (_, address), peer_process(address) as process:
        _, origin, _ = await served.wait("received")
        process.kill()
        start = time.monotonic()
        assert await served.wait("disconnected") == ("disconnected", origin)
        assert time.monotonic() - start < 0.5


@pytest.mark.process
async def test_a_stopped_process_is_noticed_in_time() -> None:
    served = ServerLog()
    async with serving(served, heartbeat_timeout=TIMEOUT) as (_, address), peer_process(address) as process:
        await served.wait("received")
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        await served.wait("disconnected")
        assert TIMEOUT - 0.5 < time.monotonic() - start < TIMEOUT + 1.0
        process.send_signal(signal.SIGCONT)
        await served.wait("received", 2)  # and comes back as another one
        assert served.events[0][1] != served.events[2][1]


@pytest.mark.process
async def test_a_held_interpreter_is_no_end() -> None:
    served = ServerLog()
    async with serving(served, heartbeat_timeout=TIMEOUT, heartbeat_interval=0.25) as (server, address), peer_process(address):
        _, origin, _ = await served.wait("received")
        server.send(origin, b"hold 2.5")
        await served.wait("received", 2)
        start = time.monotonic()
        assert await served.wait("received", 3) == ("received", origin, b"released")
        assert time.monotonic() - start > 2 * TIMEOUT
        assert served.messages == [b"hello", b"holding", b"released"]
        assert not served.named("disconnected")


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to: Address, cut: asyncio.Event | None = None) -> None:
    """Carry bytes both ways, until it is cut: then they vanish."""
    cut = cut or asyncio.Event()
    far_reader, far_writer = await asyncio.open_connection(to.host, to.port)

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            if not cut.is_set():
                sink.write(data)

    async with asyncio.TaskGroup() as group:
        try:
            carriers = [group.create_task(carry(*pair)) for pair in ((reader, far_writer), (far_reader, writer))]
            await asyncio.wait(carriers, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (writer, far_writer):
                one.close()


async def test_a_cut_network_is_noticed_by_both() -> None:
    served, heard, cut = ServerLog(), ClientLog(), asyncio.Event()
    async with (
        serving(served, heartbeat_timeout=TIMEOUT) as (_, address),
        listening(lambda reader, writer: forward(reader, writer, address, cut)) as between,
        connecting(heard, between, heartbeat_timeout=TIMEOUT) as client,
    ):
        await heard.wait("up")
        client.send(b"hello")
        await served.wait("received")
        cut.set()
        start = time.monotonic()
        await served.wait("disconnected")
        await heard.wait("down")
        assert TIMEOUT - 0.5 < time.monotonic() - start < TIMEOUT + 1.0


async def test_an_idle_connection_lives() -> None:
    served, heard = ServerLog(), ClientLog()
    async with (
        serving(served, heartbeat_timeout=0.3, heartbeat_interval=0.1) as (_, address),
        connecting(heard, address, heartbeat_timeout=0.3, heartbeat_interval=0.1) as client,
    ):
        await heard.wait("up")
        client.send(b"hello")
        asyncio.get_running_loop().call_later(1.2, heard.add, "four timeouts later")
        await heard.wait("four timeouts later")
        client.send(b"still here")
        await served.wait("received", 2)
        assert not heard.named("down")


# --- peers that are none of ours


def dealer(context: zmq.Context[Any], address: Address, **options: Any) -> zmq.Socket[bytes]:
    made: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    made.LINGER = 20_000
    for name, value in options.items():
        setattr(made, name, value)
    made.connect(f"tcp://{address.host}:{address.port}")
    return made


async def test_a_peer_that_does_not_read_is_cut(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(zmq_common, "HIGH_WATER", 20)
    served = ServerLog()
    async with serving(served, heartbeat_timeout=30.0) as (server, address):
        with zmq.Context() as context, dealer(context, address, RCVHWM=1) as peer:
            peer.send(b"hello")
            _, origin, _ = await served.wait("received")
            for _ in range(2000):
                server.send(origin, bytes(65536))
            await served.wait("disconnected")
            assert "cut the connection of a peer at 127.0.0.1" in caplog.text


async def test_a_stuffed_connection_ends_in_time() -> None:
    """Its buffers are full, so that no heartbeat gets through, but fewer messages wait than may."""
    served = ServerLog()
    async with serving(served, heartbeat_timeout=TIMEOUT) as (server, address):
        with zmq.Context() as context, dealer(context, address, RCVHWM=1) as peer:
            peer.send(b"hello")
            _, origin, _ = await served.wait("received")
            start = time.monotonic()
            for _ in range(1000):
                server.send(origin, bytes(65536))
            await served.wait("disconnected")
            assert time.monotonic() - start < TIMEOUT + 1.5


async def test_nobody_passes_for_another() -> None:
    served, heard = ServerLog(), ClientLog()
    async with serving(served) as (server, address), connecting(heard, address) as client:
        await heard.wait("up")
        client.send(b"hello")
        _, origin, _ = await served.wait("received")
        with zmq.Context() as context:
            for route in (next(iter(server._by_route)), b"boss"):  # that of the client, and one of its own choice
                other = dealer(context, address, ROUTING_ID=route, LINGER=0)
                monitor = zmq_common.open_monitor(other, [zmq.EVENT_DISCONNECTED])
                other.send(b"I am the other one")
                if route == b"boss":
                    await asyncio.to_thread(monitor.recv_multipart)  # it is cut
                server.send(origin, b"for the client")
                zmq_common.close_monitored(other, monitor)
        await heard.wait("received", 2)
        client.send(b"done")
        await served.wait("received", 2)
        assert served.messages == [b"hello", b"done"]
        assert not served.named("disconnected")


async def test_a_peer_that_sends_parts_is_cut() -> None:
    served = ServerLog()
    async with serving(served) as (_, address):
        with zmq.Context() as context, dealer(context, address) as peer:
            peer.send(b"hello")
            await served.wait("received")
            peer.send_multipart([b"one", b"two", b"three"])
            await served.wait("disconnected")
            assert served.messages == [b"hello"]


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: master\r\n\r\n",
    "zmtp 1": b"\x01\x00" + b"\x06\x00hello" * 3,
    "zmtp 2": b"\xff\0\0\0\0\0\0\0\x01\x7f" + b"\x01\x05" + b"\x00\x00" + b"\x00\x05hello",
    "half a greeting": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03",
    "a greeting and noise": b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00NULL" + bytes(48) + b"\x04\x29\x07garbage" * 10,
    "noise": bytes(range(256)) * 40,
    "nothing": b"",
}


@pytest.mark.parametrize("curve", [False, True])
async def test_strangers_do_no_harm(curve: bool) -> None:
    served, heard = ServerLog(), ClientLog()
    async with serving(served, keypair=new_keypair() if curve else None) as (server, address), connecting(heard, address) as client:
        await heard.wait("up")
        strangers = []
        for data in GARBAGE.values():
            reader, writer = await asyncio.open_connection(address.host, address.port)
            writer.write(data)
            strangers.append((reader, writer))
        late = ClientLog()
        async with connecting(late, address):
            await late.wait("up")
        client.send(b"hello")
        _, origin, _ = await served.wait("received")
        server.send(origin, b"hello")
        await heard.wait("received")
        for _, writer in strangers:
            writer.close()
        assert served.messages == [b"hello"]
        assert heard.events == [("up",), ("received", b"hello")]


@pytest.mark.parametrize("curve", [False, True])
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 8, None])
async def test_what_is_no_master_is_tried_again(answer: bytes | None, curve: bool) -> None:
    heard, calls, again = ClientLog(), 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        if answer is not None:
            writer.write(answer)
        writer.close()
        if calls == 5:
            again.set()

    async with listening(serve) as address, connecting(heard, address._replace(key=new_keypair().public if curve else None)):
        async with asyncio.timeout(10):
            await again.wait()
        assert heard.events == []


async def test_silence_is_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (zmq_common, zmq_client):
        monkeypatch.setattr(module, "HANDSHAKE", 0.1)
    heard, calls, again = ClientLog(), 0, asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            again.set()
        await reader.read()

    async with listening(serve) as address, connecting(heard, address):
        async with asyncio.timeout(10):
            await again.wait()
        assert heard.events == []


# --- the loop


async def test_descriptors_that_are_used_again_confuse_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections come and go quicker than the server reads."""
    monkeypatch.setattr(zmq_server, "GRACE", 20.0)
    clients, messages = 150, 3

    def busy(origin: Any, data: bytes) -> None:
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass

    def come_and_go(address: Address) -> None:
        with zmq.Context() as context:
            for i in range(clients):
                with dealer(context, address) as peer:
                    for _ in range(messages):
                        peer.send(b"%d" % i)

    served = ServerLog(busy)
    async with serving(served) as (server, address):
        await asyncio.to_thread(come_and_go, address)
        await served.wait("disconnected", clients, timeout=20)
        assert not server._by_number
        assert not server._by_fd
    by_origin: dict[Any, list[Any]] = {}
    for name, origin, *data in served.events:
        by_origin.setdefault(origin, []).append((name, *data))
    assert len(by_origin) == clients
    seen = set()
    for events in by_origin.values():
        data = events[0][1]
        seen.add(data)
        assert events == [("received", data)] * messages + [("disconnected",)]
    assert len(seen) == clients


async def test_what_comes_too_late_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load the end of a connection is told before all of its messages are read: then it is the last of it all the same."""
    monkeypatch.setattr(zmq_common, "BUDGET", 1)
    monkeypatch.setattr(zmq_server, "GRACE", 0.0)
    served, heard = ServerLog(), ClientLog()
    async with serving(served) as (_, address), connecting(heard, address) as client:
        with zmq.Context() as context, dealer(context, address) as peer:
            peer.send(b"hello")
            await served.wait("received")
            for _ in range(1000):
                peer.send(b"x")
        await heard.wait("up")
        await served.wait("disconnected")
        known = len(served.events)
        client.send(b"hello")
        await served.until(lambda: len(served.events) > known)
        assert known < 1000
        assert served.messages[-1] == b"hello"
        assert len(served.named("disconnected")) == 1
        assert len({event[1] for event in served.events}) == 2


def test_routes_are_counted_and_the_count_may_wrap() -> None:
    def route(count: int) -> bytes:
        return b"\0" + (count % (1 << 32)).to_bytes(4)

    for count in (0, 5, 1 << 31, (1 << 32) - 1):
        assert zmq_server._is_older(route(count), route(count + 1))
        assert not zmq_server._is_older(route(count + 1), route(count))


async def test_timers_run_while_messages_pour_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq_common, "BUDGET", 10)
    served, heard = ServerLog(), ClientLog()
    loop = asyncio.get_running_loop()
    async with serving(served) as (_, address), connecting(heard, address) as client:
        await heard.wait("up")
        client.send(b"")
        await served.wait("received")
        for _ in range(1000):
            client.send(b"x")
        block_the_loop()
        loop.call_later(0, served.add, "timer")
        await served.wait("received", 1001)
        assert served.events.index(("timer",)) < 1000


async def test_a_handler_that_raises_stops_nothing() -> None:
    loop = asyncio.get_running_loop()
    errors: list[str] = []
    loop.set_exception_handler(lambda _, context: errors.append(str(context["exception"])))

    def on_message(origin: Any, data: bytes) -> None:
        if data == b"5":
            raise RuntimeError("a bug")
        server.send(origin, data)

    class Client(ClientLog):
        def control_received(self, data: bytes) -> None:
            super().control_received(data)
            if data == b"7":
                raise RuntimeError("another bug")

    served, heard = ServerLog(on_message), Client()
    async with serving(served) as (server, address), connecting(heard, address) as client:
        await heard.wait("up")
        for i in range(10):
            client.send(b"%d" % i)
        await heard.wait("received", 9)
        assert heard.messages == [b"%d" % i for i in range(10) if i != 5]
        assert errors == ["a bug", "another bug"]


def block_the_loop() -> None:
    """For longer than a message takes, so that it is there when the loop goes on; and than libzmq trusts its last look at the socket."""
    time.sleep(0.1)


async def test_a_server_hears_what_came_before_it_sent() -> None:
    """The send takes the wake-up of the message, and no other message follows."""
    served = ServerLog()
    async with serving(served) as (server, address), peer_process(address):
        _, origin, _ = await served.wait("received")
        for i in range(1, 4):
            server.send(origin, b"echo %d" % i)
            block_the_loop()
            server.send(origin, b"ignore")
            await served.wait("received", 1 + i, timeout=2)


async def test_a_client_hears_what_came_before_it_sent() -> None:
    def serve(router: zmq.Socket[bytes]) -> None:
        for i in range(1, 4):
            route, _ = router.recv_multipart()
            router.send_multipart([route, b"%d" % i])
            router.recv_multipart()

    heard = ClientLog()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        address = Address("127.0.0.1", router.bind_to_random_port("tcp://127.0.0.1"))
        async with connecting(heard, address) as client:
            await heard.wait("up")
            serving = asyncio.create_task(asyncio.to_thread(serve, router))
            await asyncio.sleep(0)
            for i in range(1, 4):
                client.send(b"ask")
                block_the_loop()
                client.send(b"ignore")
                await heard.wait("received", i, timeout=2)
            await serving
