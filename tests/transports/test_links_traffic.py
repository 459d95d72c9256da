"""What every link does with frames: the same tests over memory, TCP and TCP over IPv6."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tracemalloc
from collections import deque

import numpy as np
import pytest
import uvloop

from pccl.core.frames import MAX_PAYLOAD, SEAL_GOOD, Header, Kind, pack_header
from pccl.transports.base import Link, OutFrame
from pccl.transports.memory import MemoryNetwork
from tests.support.links import EPOCH, NETS, Drip, LinkNet, Side, data, in_virtual_time, until_true

MIB = 1 << 20


def mixed_frames(seed: int, count: int, longest: int) -> list[OutFrame]:
    """Slices of all lengths, also none, and frames of the other kinds."""
    rng = random.Random(seed)
    frames = []
    for i in range(count):
        if rng.random() < 0.3:
            frames.append(OutFrame(Header(Kind.CREDIT, EPOCH, call=i, position=rng.getrandbits(60)), None, None))
        else:
            frames.append(data(rng.randbytes(rng.choice([0, 1, 3, 4, 100, rng.randrange(longest)])), call=i))
    return frames


def contents(frames: list[OutFrame]) -> list[tuple[Header, bytes | None]]:
    return [(f.header, bytes(f.payload or b"")) for f in frames]


async def exchange(links: LinkNet, a: Side, b: Side, count: int, longest: int) -> None:
    there, back = mixed_frames(1, count, longest), mixed_frames(2, count, longest)
    a.send(*there)
    b.send(*back)
    await b.until(lambda: len(b.got) == count)
    await a.until(lambda: len(a.got) == count)
    assert b.got == contents(there)
    assert a.got == contents(back)
    await a.until(lambda: a.sent == there)
    await b.until(lambda: b.sent == back)
    assert not a.lost
    assert not b.lost


async def test_frames_keep_their_order_both_ways_at_once(links: LinkNet) -> None:
    await exchange(links, *await links.pair(), count=300, longest=100_000)


async def test_one_byte_at_a_time(links: LinkNet) -> None:
    await exchange(links, *await links.pair(Drip), count=20, longest=200)


def test_on_the_loop_that_engines_use() -> None:
    async def main() -> None:
        links = LinkNet(NETS["tcp"])
        await exchange(links, *await links.pair(), count=300, longest=100_000)
        await links.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("seed", range(5))
async def test_bytes_that_travel_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    links = LinkNet("")
    links.memory = MemoryNetwork(piece=lambda: rng.choice([1, 2, 63, 64, 65, 1000, 70_000]))
    await exchange(links, *await links.pair(), count=50, longest=30_000)
    await links.close()


async def test_frames_without_payload_have_no_place(links: LinkNet) -> None:
    a, b = await links.pair()
    a.send(data(b"", call=1), data(None, call=2), data(b"x", call=3))
    await b.wait("ended", 3)
    assert [(h.call, payload) for h, payload in b.got] == [(1, b""), (2, b""), (3, b"x")]
    assert [event[1].call for event in b.named("begun")] == [3]


async def test_payloads_go_to_the_memory_that_was_named_and_to_no_other(links: LinkNet) -> None:
    a, b = await links.pair()
    source = np.random.default_rng(1).integers(0, 256, 4 * MAX_PAYLOAD, np.uint8)
    target = np.zeros_like(source)
    b.place = lambda header: target.data[header.position : header.position + header.length]
    b.ended_instead = lambda link, header, good: b.add("ended", header, good)
    tracemalloc.start()
    try:
        a.send(*(data(source.data[at : at + MAX_PAYLOAD], position=at) for at in range(0, len(source), MAX_PAYLOAD)))
        await b.wait("ended", 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(source, target)
    assert peak < 2 * MIB  # what is in memory's wires, too


async def test_a_frame_without_a_place_is_read_to_its_end(links: LinkNet) -> None:
    a, b = await links.pair()
    b.place = lambda header: None if header.call == 1 else memoryview(bytearray(header.length))
    a.send(data(bytes(MAX_PAYLOAD), call=1), data(b"next", call=2))
    await b.wait("ended", 2)
    assert [(h.call, payload) for h, payload in b.got] == [(1, None), (2, b"next")]


async def test_a_payload_is_redirected_in_the_middle(links: LinkNet) -> None:
    b, peer = await links.insider()
    memory = bytearray(1000)
    b.place = lambda header: memoryview(memory)[: header.length]
    frame = pack_header(Header(Kind.DATA, EPOCH, 1, length=1000))
    await peer.send(frame, b"x" * 600)
    await until_true(lambda: memory[599])
    assert b.link
    b.link.redirect(Header(Kind.DATA, EPOCH, 1, length=1000))
    memory[:] = b"-" * 1000
    await peer.send(b"x" * 400, SEAL_GOOD, pack_header(Header(Kind.DATA, EPOCH, 2, length=4)), b"next", SEAL_GOOD)
    await b.wait("ended", 2)
    assert bytes(memory[4:]) == b"-" * 996
    assert [(h.call, payload) for h, payload in b.got] == [(1, None), (2, b"next")]


@pytest.mark.parametrize("seal", [b"void", b"pccX", b"\0\0\0\0"])
async def test_a_payload_whose_seal_is_damaged_is_not_good_and_the_next_one_is(links: LinkNet, seal: bytes) -> None:
    b, peer = await links.insider()
    frames = [pack_header(Header(Kind.DATA, EPOCH, k, length=5)) for k in (1, 2)]
    await peer.send(frames[0], b"hello", seal, frames[1], b"again", SEAL_GOOD)
    await b.wait("ended", 2)
    assert [(h.call, payload) for h, payload in b.got] == [(1, None), (2, b"again")]
    assert not b.lost


async def test_an_abort_in_mid_frame_lets_go_of_the_memory_and_the_link_goes_on(links: LinkNet) -> None:
    a, peer = await links.insider()
    memory = bytearray(b"x" * (4 * MAX_PAYLOAD))
    token = object()
    a.send(*(data(memoryview(memory)[k * MAX_PAYLOAD : (k + 1) * MAX_PAYLOAD], call=k, token=token) for k in range(4)))
    out = len(a.sent)
    assert out < 4  # more than any buffer of the system takes
    assert a.link
    a.link.abort(token)
    memory[:] = b"-" * len(memory)
    a.outbox.clear()
    a.send(data(b"next", call=9))
    got = await peer.frames(lambda got: bool(got) and got[-1].header.call == 9)
    assert [(f.header.call, f.good) for f in got] == [*((k, True) for k in range(out)), (out, False), (9, True)]
    assert not any(b"-" in f.payload for f in got)
    assert [f.header.call for f in a.sent] == [*range(out), 9]


async def test_an_abort_of_what_has_not_begun_leaves_no_trace(links: LinkNet) -> None:
    a, peer = await links.insider()
    big, token = bytes(MAX_PAYLOAD), object()
    a.send(*(data(big, call=k) for k in range(4)))  # the rest waits
    a.send(data(b"no", call=8, token=token), data(b"yes", call=9))
    a.outbox = deque(f for f in a.outbox if f.token is not token)
    assert a.link
    a.link.abort(token)
    got = await peer.frames(lambda got: bool(got) and got[-1].header.call == 9)
    assert [f.header.call for f in got] == [0, 1, 2, 3, 9]
    assert all(f.good for f in got)


async def test_a_frame_that_comes_up_while_the_one_before_waits_for_room(links: LinkNet) -> None:
    a, peer = await links.insider()
    memory = bytearray(MAX_PAYLOAD)
    count = 8
    a.send(*(data(memory, call=k) for k in range(count)))
    out = len(a.sent)
    assert out < count  # the rest waits
    a.send(data(b"last", call=count))
    got = await peer.frames(lambda got: len(got) > count)
    assert [f.header.call for f in got] == list(range(count + 1))


async def test_a_callback_that_aborts_what_went_out_with_it(links: LinkNet) -> None:
    """Frames that leave together are reported one by one; by then all of them are out."""
    a, peer = await links.insider()
    first, second = object(), object()

    def aborts(link: Link, frame: OutFrame) -> None:
        a.add("sent", frame)
        if frame.token is first:
            link.abort(second)

    a.sent_instead = aborts
    a.send(data(b"1", call=1, token=first), data(b"2", call=2, token=second), data(b"3", call=3))
    got = await peer.frames(lambda got: len(got) == 3)
    assert [(f.header.call, f.good) for f in got] == [(1, True), (2, True), (3, True)]
    assert [f.header.call for f in a.sent] == [1, 3]
    a.send(data(b"4", call=4))
    (last,) = await peer.frames(lambda got: len(got) == 1)
    assert last.header.call == 4


async def test_a_callback_that_closes_sends_nothing_twice(links: LinkNet) -> None:
    a, peer = await links.insider()
    a.sent_instead = lambda link, frame: link.close()
    a.send(data(b"1", call=1), data(b"2", call=2))
    got = await peer.frames(lambda got: False)
    assert [f.header.call for f in got] == [1, 2]


# --- who does not read ----------------------------------------------------------------------------------------------


async def held_back(links: LinkNet, seconds: float) -> None:
    """A peer does not read for so long. The sender hands over no more than buffers hold, the link is not silent, and nothing is lost."""
    a, peer = await links.insider()
    count = 64
    payload = np.random.default_rng(1).integers(0, 256, MIB, np.uint8).tobytes()
    a.send(*(data(payload, call=k) for k in range(count)))
    assert a.link
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    stuck = len(a.sent)
    silent = 0.0
    never = asyncio.Event()
    while loop.time() < end:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(never.wait(), 0.25)
        silent = max(silent, a.link.silent_for())
    assert len(a.sent) <= stuck + 16  # buffers may grow
    assert len(a.sent) < count
    assert silent < 1.0
    got = await peer.frames(lambda got: len(got) == count)
    assert [f.header.call for f in got] == list(range(count))
    assert all(f.good and f.payload == payload for f in got)
    await a.until(lambda: len(a.sent) == count)
    assert not a.lost


def test_a_peer_that_does_not_read_for_ten_seconds() -> None:
    async def main() -> None:
        links = LinkNet(NETS["memory"])
        await held_back(links, 10.0)
        await links.close()

    in_virtual_time(main())


@pytest.mark.slow
async def test_a_peer_that_does_not_read_for_ten_seconds_over_tcp() -> None:
    links = LinkNet(NETS["tcp"])
    await held_back(links, 10.0)
    await links.close()


def test_a_host_that_acknowledges_nothing_is_silent() -> None:
    async def main() -> None:
        links = LinkNet(NETS["memory"])
        a, b = await links.pair()
        loop = asyncio.get_running_loop()
        a.send(data(b"x", call=1))
        await b.wait("ended")
        assert a.link
        await until_true(lambda: a.link and a.link.silent_for() == 0)
        links.memory.delay = lambda source, target: None
        a.send(data(b"x", call=2))
        since = loop.time()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 5.0)
        assert a.link.silent_for() == pytest.approx(loop.time() - since)
        links.memory.delay = lambda source, target: 0.0
        await b.wait("ended", 2)
        await until_true(lambda: a.link and a.link.silent_for() == 0)
        await links.close()

    in_virtual_time(main())
