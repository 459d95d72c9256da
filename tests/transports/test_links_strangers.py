"""Who may have a link: whoever proves the secret of the admission, in time. The same tests over memory, TCP and TCP over IPv6."""

from __future__ import annotations

import asyncio
import os
import random
import tracemalloc

import pytest

from pccl.core.frames import Header, Kind, pack_header
from pccl.transports import streams
from pccl.transports.base import LinkTicket, Refusal
from pccl.transports.wire import HELLO, MAGIC, NONCE_BYTES, PROOF_BYTES, VERSION, WELCOME, _proof
from tests.support.links import EPOCH, NETS, PATIENCE, TICKET, LinkNet, Stranger, data, in_virtual_time, until_true

REPLY_BYTES = NONCE_BYTES + PROOF_BYTES


def hello(ticket: LinkTicket = TICKET, *, magic: bytes = MAGIC, version: int = VERSION, nonce: bytes = b"n" * NONCE_BYTES) -> bytes:
    return HELLO.pack(magic, version, ticket.admission, ticket.dialer, ticket.acceptor, nonce)


async def still_serves(links: LinkNet, endpoint: str) -> None:
    """A real peer gets its link, and frames go through it."""
    a = await links.dial(endpoint)
    b = await links.accepted()
    a.send(data(b"hello"))
    await b.wait("ended")
    assert b.got[0][1] == b"hello"


# --- those who dial -------------------------------------------------------------------------------------------------


STRANGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: example\r\nUser-Agent: stranger\r\n\r\n",
    "another version": hello(version=VERSION + 1),
    "noise": random.Random(1).randbytes(HELLO.size),
    "an unknown admission": hello(TICKET._replace(admission=8)),
    "an unknown peer": hello(TICKET._replace(dialer=3)),
    "for somebody else": hello(TICKET._replace(acceptor=3)),
}


@pytest.mark.parametrize("what", STRANGE)
async def test_a_stranger_learns_nothing_and_is_closed_at_once(links: LinkNet, what: str) -> None:
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    await stranger.send(STRANGE[what])
    assert await stranger.rest() == b""
    await still_serves(links, endpoint)
    assert links.accepts == 0


async def test_a_wrong_proof(links: LinkNet) -> None:
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    await stranger.send(hello())
    reply = await stranger.receive(REPLY_BYTES)
    assert reply[NONCE_BYTES:] == _proof(TICKET.secret, b"acceptor", hello() + reply[:NONCE_BYTES])
    await stranger.send(os.urandom(PROOF_BYTES))
    assert await stranger.rest() == b""
    assert links.accepts == 0
    await still_serves(links, endpoint)


async def test_the_proof_of_another_secret(links: LinkNet) -> None:
    endpoint = await links.listen()
    with pytest.raises(Refusal, match="does not know the epoch's secret"):
        await links.dial(endpoint, TICKET._replace(secret=b"t" * 32))
    assert links.accepts == 0
    await still_serves(links, endpoint)


async def test_the_acceptors_own_proof_is_none_for_a_dialer(links: LinkNet) -> None:
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    await stranger.send(hello())
    reply = await stranger.receive(REPLY_BYTES)
    await stranger.send(reply[NONCE_BYTES:])
    assert await stranger.rest() == b""
    assert links.accepts == 0


async def test_a_handshake_cannot_be_replayed(links: LinkNet) -> None:
    """What a real dialer said once is worth nothing the next time, be it to the letter."""
    endpoint = await links.listen()
    said = []
    house, visitor = await links.open_house()
    dialling = asyncio.create_task(links.dial(house))
    dialer, onward = await visitor(), await links.stranger(endpoint)
    for there, back in ((HELLO.size, REPLY_BYTES), (PROOF_BYTES, len(WELCOME))):  # somebody in the middle passes all on
        said.append(await dialer.receive(there))
        await onward.send(said[-1])
        await dialer.send(await onward.receive(back))
    await dialling
    await links.accepted()
    again = await links.stranger(endpoint)
    await again.send(said[0])
    assert len(await again.receive(REPLY_BYTES)) == REPLY_BYTES
    await again.send(said[1])
    assert await again.rest() == b""
    assert links.accepts == 0


async def test_frames_before_the_proof_are_no_frames(links: LinkNet) -> None:
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    await stranger.send(hello(), pack_header(Header(Kind.MARK, EPOCH)) * 10)
    assert len(await stranger.rest()) == REPLY_BYTES
    assert links.accepts == 0


async def test_frames_right_behind_the_proof_are(links: LinkNet) -> None:
    """A dialer need not wait for the welcome; what it sends early is not lost in the handshake."""
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    await stranger.send(hello())
    reply = await stranger.receive(REPLY_BYTES)
    proof = _proof(TICKET.secret, b"dialer", hello() + reply[:NONCE_BYTES])
    await stranger.send(proof, pack_header(Header(Kind.MARK, EPOCH)))
    b = await links.accepted()
    await b.wait("ended")
    assert b.got == [(Header(Kind.MARK, EPOCH), b"")]


async def test_a_handshake_that_comes_byte_by_byte(links: LinkNet) -> None:
    endpoint = await links.listen()
    stranger = await links.stranger(endpoint)
    for k in range(HELLO.size):
        await stranger.send(hello()[k : k + 1])
    reply = await stranger.receive(REPLY_BYTES)
    proof = _proof(TICKET.secret, b"dialer", hello() + reply[:NONCE_BYTES])
    for k in range(PROOF_BYTES):
        await stranger.send(proof[k : k + 1])
    assert await stranger.receive(len(WELCOME)) == WELCOME
    await links.accepted()


@pytest.mark.parametrize("said", [0, 1, HELLO.size - 1])
async def test_who_hangs_up_in_the_handshake_is_forgotten(links: LinkNet, said: int) -> None:
    at = links.make()
    endpoint = await links.listen(at)
    stranger = await links.stranger(endpoint)
    await stranger.send(hello()[:said])
    stranger.wire.shutdown()
    assert await stranger.rest() == b""
    await still_serves(links, endpoint)
    assert not at._strangers


@pytest.mark.parametrize("said", [0, HELLO.size - 1, HELLO.size])
async def test_who_says_too_little_is_closed_in_time_and_keeps_nobody_waiting(
    links: LinkNet, monkeypatch: pytest.MonkeyPatch, said: int
) -> None:
    monkeypatch.setattr(streams, "PROOF_TIMEOUT", 0.5)
    here = links.make()
    endpoint = await links.listen(here)
    idle = [await links.stranger(endpoint) for _ in range(20)]
    for stranger in idle:
        await stranger.send(hello()[:said])
    await until_true(lambda: here._strangers.total() == 20)
    await asyncio.sleep(0)  # each has begun to wait
    monkeypatch.undo()
    await still_serves(links, endpoint)
    replies = await asyncio.gather(*(stranger.rest() for stranger in idle))
    assert {len(r) for r in replies} == {REPLY_BYTES if said == HELLO.size else 0}
    assert links.accepts == 0


def test_the_limit_is_three_seconds_whatever_trickles_in() -> None:
    async def main() -> None:
        links = LinkNet(NETS["memory"])
        stranger = await links.stranger(await links.listen())
        loop = asyncio.get_running_loop()
        began = loop.time()
        for k in range(HELLO.size):
            loop.call_later(0.1 * k, stranger.wire.write, [hello()[k : k + 1]])
        assert await stranger.rest() == b""
        assert loop.time() - began == pytest.approx(3.0)
        await links.close()

    in_virtual_time(main())


async def test_so_many_strangers_of_one_host_and_no_more(
    links: LinkNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(streams, "STRANGERS_PER_HOST", 4)
    here, at = links.make(), links.make()
    endpoint = await links.listen(here)
    first = [await at._connect(endpoint) for _ in range(4)]
    refused = await at._connect(endpoint)
    try:
        assert await Stranger(refused).rest() == b""
        assert "one more is refused" in caplog.text
        for wire in first:
            wire.close()
        await until_true(lambda: not here._strangers)
        await still_serves(links, endpoint)
    finally:
        for wire in (*first, refused):
            wire.close()


async def test_garbage_takes_no_memory(links: LinkNet) -> None:
    endpoint = await links.listen()
    garbage = random.Random(2).randbytes(1 << 20)
    tracemalloc.start()
    try:
        for _ in range(10):
            stranger = await links.stranger(endpoint)
            sending = asyncio.create_task(stranger.send(garbage))
            assert await stranger.rest() == b""
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            stranger.wire.close()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    await still_serves(links, endpoint)


# --- those who are dialled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [b"", b"x", b"HTTP/1.1 400 Bad Request\r\nServer: something else\r\n\r\n", bytes(200)])
async def test_an_endpoint_that_proves_nothing_is_refused(links: LinkNet, reply: bytes) -> None:
    house, visitor = await links.open_house()
    dialling = asyncio.create_task(links.dial(house))
    stranger = await visitor()
    await stranger.receive(HELLO.size)
    await stranger.send(reply)
    stranger.wire.shutdown()
    with pytest.raises(Refusal, match=r"hung up|does not know"):
        await dialling
    assert await stranger.rest() == b""


async def test_an_endpoint_that_takes_the_proof_and_hangs_up_is_refused(links: LinkNet) -> None:
    house, visitor = await links.open_house()
    dialling = asyncio.create_task(links.dial(house))
    stranger = await visitor()
    said = await stranger.receive(HELLO.size)
    nonce = os.urandom(NONCE_BYTES)
    await stranger.send(nonce, _proof(TICKET.secret, b"acceptor", said + nonce))
    await stranger.receive(PROOF_BYTES)
    await stranger.send(b"no")
    with pytest.raises(Refusal, match="did not accept the proof"):
        await dialling


async def test_a_silent_endpoint_is_refused_in_time(links: LinkNet) -> None:
    house, visitor = await links.open_house()
    with pytest.raises(Refusal, match=r"no answer within 0\.2 s"):
        await links.dial(house, timeout=0.2)
    stranger = await visitor()
    assert len(await stranger.rest()) == HELLO.size  # and the connection was closed


@pytest.mark.parametrize("step", ["connect", "reply", "welcome"])
async def test_a_cancelled_dial_closes_its_connection(links: LinkNet, step: str) -> None:
    house, visitor = await links.open_house()
    dialling = asyncio.create_task(links.dial(house))
    stranger = await visitor()
    if step != "connect":
        said = await stranger.receive(HELLO.size)
    if step == "welcome":
        nonce = os.urandom(NONCE_BYTES)
        await stranger.send(nonce, _proof(TICKET.secret, b"acceptor", said + nonce))
        await stranger.receive(PROOF_BYTES)
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    await stranger.rest()


async def test_nobody_listens(links: LinkNet) -> None:
    at = links.make()
    endpoint = await links.listen(at)
    await at.close()
    with pytest.raises(Refusal):
        await links.dial(endpoint)
    with pytest.raises(Refusal, match="no endpoint is known"):
        await links.make().dial((), TICKET, None, 1.0)  # type: ignore[arg-type]


async def test_the_first_endpoint_that_proves_itself_is_taken(links: LinkNet) -> None:
    gone, here = links.make(), links.make()
    nobody, somebody = await links.listen(gone), await links.listen(here)
    await gone.close()
    side = await links.make().dial((nobody, "nonsense", somebody), TICKET, (await links.pair())[0], PATIENCE)
    await links.accepted()
    side.close()


async def test_a_transport_that_closes_sends_strangers_away_at_once(links: LinkNet) -> None:
    at = links.make()
    endpoint = await links.listen(at)
    quiet, talking = await links.stranger(endpoint), await links.stranger(endpoint)
    await talking.send(hello())
    await talking.receive(REPLY_BYTES)
    await at.close()
    assert await talking.rest() == b""
    assert await quiet.rest() == b""


async def test_both_sides_dial_at_once(links: LinkNet) -> None:
    one, two = links.make(), links.make()
    back = TICKET._replace(dialer=1, acceptor=2)
    at_one, at_two = await links.listen(one, [back]), await links.listen(two, [TICKET])
    dialled = await asyncio.gather(links.dial(at_two, TICKET, at=one), links.dial(at_one, back, at=two))
    accepted = [await links.accepted() for _ in dialled]
    assert {side.link.uid for side in dialled if side.link} == {1, 2} == {side.link.uid for side in accepted if side.link}
    for side in dialled:
        assert side.link
        side.send(data(b"from %d" % (3 - side.link.uid)))
    for side in accepted:
        await side.wait("ended")
        assert side.link
        assert side.got[0][1] == b"from %d" % side.link.uid
