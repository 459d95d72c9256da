"""How links end: by themselves, by what the other side does, and by what it sends. The same tests over memory, TCP and TCP over IPv6."""

from __future__ import annotations

import asyncio
import resource
import socket
import tracemalloc

import pytest

from pccl.core.codec import WireError
from pccl.core.frames import HEADER_BYTES, MAX_PAYLOAD, SEAL_BYTES, SEAL_GOOD, Header, Kind, pack_header
from pccl.transports import tcp
from pccl.transports.base import Link, OutFrame
from pccl.transports.link import LINGER
from pccl.transports.tcp import TcpWire
from pccl.transports.wire import HELLO, offer_proof
from tests.support.links import EPOCH, NETS, PATIENCE, TICKET, LinkNet, Side, data, in_virtual_time, until_true

FRAME = pack_header(Header(Kind.DATA, EPOCH, 1, length=1000)) + b"x" * 1000 + SEAL_GOOD


async def lost(side: Side, kind: type[Exception]) -> None:
    """The link is lost for this reason, of which its handler hears once and last; it can still be asked for anything."""
    await side.wait("lost")
    assert side.events[-1][0] == "lost"
    assert len(side.lost) == 1
    assert isinstance(side.lost[0], kind)
    assert side.link
    await asyncio.wait_for(side.link.wait_closed(), PATIENCE)
    side.send(data(b"too late"))
    side.link.abort(None)
    side.link.redirect(Header(Kind.DATA, EPOCH))
    assert side.link.silent_for() >= 0
    side.link.close()
    assert len(side.lost) == 1
    assert not side.sent


# --- what the other side does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [0, 1, HEADER_BYTES, HEADER_BYTES + 500, len(FRAME) - 1, len(FRAME)])
async def test_the_other_side_writes_no_more(links: LinkNet, said: int) -> None:
    """A link that is half closed is lost; what had come whole before has come."""
    b, peer = await links.insider()
    await peer.send(FRAME[:said])
    peer.wire.shutdown()
    await lost(b, ConnectionResetError)
    assert b.got == ([(Header(Kind.DATA, EPOCH, 1, length=1000), b"x" * 1000)] if said == len(FRAME) else [])
    assert await peer.rest() == b""


@pytest.mark.parametrize("said", [0, HEADER_BYTES + 500])
async def test_the_connection_is_reset(links: LinkNet, said: int) -> None:
    b, peer = await links.insider()
    await peer.send(FRAME[:said])
    await until_true(lambda: bool(b.named("begun")) == (said > 0))
    peer.reset()
    await lost(b, ConnectionError)
    assert not b.got


async def test_the_connection_is_reset_while_this_side_writes(links: LinkNet) -> None:
    a, peer = await links.insider()
    memory = bytearray(MAX_PAYLOAD)
    a.send(*(data(memory, call=k) for k in range(8)))
    await peer.receive(1000)
    out = len(a.sent)
    assert out < 8
    peer.reset()
    await a.wait("lost")
    assert [event[0] for event in a.events] == ["sent"] * out + ["lost"]


# --- what it sends --------------------------------------------------------------------------------------------------


def damaged(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


NONSENSE = {
    "noise": b"\x17" * 200,
    "a damaged header": damaged(FRAME, 10),
    "a damaged check": damaged(FRAME, HEADER_BYTES - 1),
    "an unknown kind": pack_header(Header(9, EPOCH)),
    "a length on a frame that has no payload": pack_header(Header(Kind.CREDIT, EPOCH, length=1)),
    "one byte too many": pack_header(Header(Kind.DATA, EPOCH, length=MAX_PAYLOAD + 1)),
    "an absurd length": pack_header(Header(Kind.DATA, EPOCH, length=(1 << 32) - 1)),
    "another hello": HELLO.pack(b"PCCLlink", 1, 7, 2, 1, bytes(16)) * 2,
}


@pytest.mark.parametrize("what", NONSENSE)
async def test_who_breaks_the_protocol_loses_the_link(links: LinkNet, what: str) -> None:
    b, peer = await links.insider()
    tracemalloc.start()
    try:
        await peer.send(FRAME, NONSENSE[what], FRAME)
        await lost(b, WireError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(b.got) == 1  # what was before it, and nothing of what was behind
    assert peak < 1 << 20
    await peer.rest()


async def test_the_longest_frame_is_allowed(links: LinkNet) -> None:
    a, b = await links.pair()
    a.send(data(bytes(MAX_PAYLOAD)))
    await b.wait("ended")
    assert b.got[0][1] == bytes(MAX_PAYLOAD)


# --- closing --------------------------------------------------------------------------------------------------------


async def test_who_closes_hears_no_more_and_the_other_side_gets_all(links: LinkNet) -> None:
    a, b = await links.pair()
    a.send(*(data(b"x" * 1000, call=k) for k in range(10)))
    assert a.link
    a.link.close()
    heard = len(a.events)
    b.send(data(b"hello?"))
    await b.wait("lost")
    assert [h.call for h, _ in b.got] == list(range(10))
    await a.link.wait_closed()
    assert len(a.events) == heard


async def test_both_sides_close_at_once(links: LinkNet) -> None:
    a, b = await links.pair()
    assert a.link
    assert b.link
    a.link.close()
    b.link.close()
    b.link.close()
    await asyncio.gather(a.link.wait_closed(), b.link.wait_closed())
    assert not a.lost
    assert not b.lost


async def test_a_close_in_mid_frame_lets_go_of_the_memory(links: LinkNet) -> None:
    """What the system took still arrives, though the other side goes on sending; then comes the end."""
    a, peer = await links.insider()
    memory = bytearray(b"x" * MAX_PAYLOAD)
    a.send(*(data(memory, call=k) for k in range(8)))
    out = len(a.sent)
    assert out < 8
    assert a.link
    whole = HEADER_BYTES + MAX_PAYLOAD + SEAL_BYTES
    taken = out * whole + a.link._first.writer._queue[0].sent
    a.link.close()
    memory[:] = b"-" * MAX_PAYLOAD
    await peer.send(FRAME)
    stream = await peer.rest()
    assert len(stream) >= taken
    for k in range(out + 1):
        payload = stream[k * whole :][HEADER_BYTES : HEADER_BYTES + MAX_PAYLOAD]
        assert payload == b"x" * len(payload)
    assert len(a.sent) == out
    assert not a.lost


async def test_a_handler_closes_while_a_frame_comes_in(links: LinkNet) -> None:
    b, peer = await links.insider()

    def close(header: Header) -> None:
        assert b.link
        b.link.close()

    b.place = close
    await peer.send(FRAME, FRAME, b"and noise" * 100)
    peer.wire.shutdown()
    assert await peer.rest() == b""
    assert len(b.named("begun")) == 1
    assert not b.got
    assert not b.lost


async def test_a_handler_closes_in_mid_write(links: LinkNet) -> None:
    a, peer = await links.insider()

    def closes(link: Link) -> OutFrame | None:
        link.close()
        return None

    assert a.link
    a.next_instead = closes
    a.link.wake()
    assert await peer.rest() == b""
    await a.link.wait_closed()
    assert not a.lost


def test_who_never_hangs_up_is_waited_for_a_moment_only() -> None:
    async def main() -> None:
        links = LinkNet(NETS["memory"])
        a, peer = await links.insider()
        loop = asyncio.get_running_loop()
        assert a.link
        began = loop.time()
        a.link.close()
        await a.link.wait_closed()
        assert loop.time() - began == pytest.approx(LINGER)
        assert await peer.rest() == b""
        await links.close()

    in_virtual_time(main())


async def test_who_never_stops_sending_is_waited_for_a_moment_only(links: LinkNet) -> None:
    a, peer = await links.insider()

    async def flood() -> None:
        while True:
            await peer.send(bytes(1 << 16))
            await asyncio.sleep(0)

    flooding = asyncio.create_task(flood())
    assert a.link
    a.link.close()
    await asyncio.wait_for(a.link.wait_closed(), PATIENCE)
    flooding.cancel()
    await asyncio.gather(flooding, return_exceptions=True)


async def test_an_open_link_lives_on_when_its_transport_closes(links: LinkNet) -> None:
    here = links.make()
    endpoint = await links.listen(here)
    a = await links.dial(endpoint)
    b = await links.accepted()
    assert b.link
    closing = asyncio.create_task(here.close())
    await asyncio.sleep(0)
    a.send(data(b"still here"))
    await b.wait("ended")
    await asyncio.wait_for(closing, PATIENCE)


# --- descriptors ----------------------------------------------------------------------------------------------------


async def test_a_closed_wire_names_no_descriptor() -> None:
    """Its number may be another's by now."""
    near, far = socket.socketpair()
    with far:
        wire = TcpWire(near)
        assert wire.fileno() == near.fileno()
        wire.close()
        assert wire.fileno() == -1


async def test_no_descriptors_left_to_accept_with(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever dials waits; the loop is not kept busy with it; and as soon as there are some again, all is well."""
    monkeypatch.setattr(tcp, "ACCEPT_PAUSE", 0.1)
    links = LinkNet(NETS["tcp"])
    stranger = await links.stranger(await links.listen())
    await until_true(lambda: links._transports[0]._strangers)
    host, port = stranger.wire._sock.getpeername()  # type: ignore[attr-defined]
    sock = socket.socket()
    sock.setblocking(False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, limits[1]))
    spare = []
    try:
        while True:  # fill the gaps
            try:
                spare.append(socket.socket())
            except OSError:
                break
        await asyncio.get_running_loop().sock_connect(sock, (host, port))
        await until_true(lambda: "raise the limit of open files" in caplog.text)
        turns = 0
        while turns < 100:
            await asyncio.sleep(0)
            turns += 1
        assert caplog.text.count("raise the limit of open files") < 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for one in spare:
            one.close()
    wire = TcpWire(sock)
    links._wires.append(wire)
    await offer_proof(wire, TICKET)
    await links.accepted()
    await links.close()
