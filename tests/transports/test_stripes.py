"""Links with several wires: what overtakes what, and what a wire's end means for the others. Over memory and TCP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from pccl.core.frames import MAX_PAYLOAD, SEAL_GOOD, Header, Kind, pack_header
from pccl.transports import link as link_module
from pccl.transports.base import MOST_SMALL, LinkTicket, OutFrame, Refusal
from pccl.transports.stripes import FAR, FAR_START, LEAST_SPAN, Growth
from pccl.transports.tcp import STRIPES, TcpWire
from pccl.transports.wire import STRIPE_MAGIC, Account, Wire, offer_proof
from tests.support.links import EPOCH, NETS, TICKET, LinkNet, Side, data, in_virtual_time, until_true

LARGE = MOST_SMALL + 1


@pytest.fixture(params=["memory", "tcp"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Wires keep no account here: a link gets all its stripes as soon as it looks for the first time."""
    monkeypatch.setattr(TcpWire, "account", Wire.account)
    monkeypatch.setattr(link_module, "LOOK", 0.0)
    return str(request.param)


@pytest.fixture
async def net(kind: str) -> AsyncIterator[LinkNet]:
    made = striped(kind)
    yield made
    await made.close()


def striped(kind: str, stripes: int = 3) -> LinkNet:
    net = LinkNet(NETS[kind], stripes)
    net.memory.stripes = stripes
    return net


async def grown(net: LinkNet) -> tuple[Side, Side]:
    """Both ends of a link that has all its stripes, and on which nothing is under way."""
    a, b = await net.pair()
    count = 0
    while not all(side.link and len(side.link._stripes) == net.stripes for side in (a, b)):
        a.send(data(bytes(MAX_PAYLOAD), call=count))
        count += 1
        await b.wait("ended", count)
    a.events.clear()
    b.events.clear()
    return a, b


def mixed(seed: int, count: int) -> list[OutFrame]:
    rng = random.Random(seed)
    frames = []
    for i in range(count):
        kind = rng.choice((Kind.CREDIT, Kind.DISCARDED, Kind.MARK, Kind.DATA, Kind.DATA, Kind.DATA))
        if kind == Kind.DATA:
            frames.append(data(rng.randbytes(rng.choice((10, MOST_SMALL, LARGE, rng.randrange(LARGE, 1 << 19)))), call=i))
        else:
            frames.append(OutFrame(Header(kind, EPOCH, call=i), None, None))
    return frames


def check_order(sent: list[OutFrame], got: list[tuple[Header, bytes | None]], pulled: list[int]) -> None:
    """What a link promises.

    Args:
        pulled: calls in the order in which their frames left.
    """
    assert {h.call: (h, payload) for h, payload in got} == {f.header.call: (f.header, bytes(f.payload or b"")) for f in sent}
    assert len(got) == len(sent)
    small = [f.header.call for f in sent if f.header.length <= MOST_SMALL]
    assert [h.call for h, _ in got if h.length <= MOST_SMALL and h.kind not in (Kind.DISCARDED, Kind.MARK)] == [
        call for call in small if sent[call].header.kind not in (Kind.DISCARDED, Kind.MARK)
    ]
    heard: set[int] = set()
    for header, _ in got:
        if header.kind in (Kind.DISCARDED, Kind.MARK):
            assert set(pulled[: pulled.index(header.call)]) - heard <= {
                f.header.call for f in sent if f.header.kind in (Kind.DISCARDED, Kind.MARK)
            }
        heard.add(header.call)


def write_down(side: Side) -> list[int]:
    """The calls of its frames, as they leave."""
    pulled: list[int] = []
    inner = side.next_frame

    def next_frame(*args: object, **kwargs: bool) -> OutFrame | None:
        frame = inner(*args, **kwargs)  # type: ignore[arg-type]
        if frame:
            pulled.append(frame.header.call)
        return frame

    assert side.link
    side.next_frame = next_frame  # type: ignore[assignment]
    for track in side.link._tracks:
        pull = side.link._next_small if track is side.link._first else lambda: next_frame(side.link, small=False)
        track.writer._pull = pull
    return pulled


# --- order ------------------------------------------------------------------------------------------------------------


async def test_small_frames_keep_their_order_and_what_speaks_of_others_comes_after_them(net: LinkNet) -> None:
    a, b = await grown(net)
    there, back = mixed(1, 200), mixed(2, 200)
    leaving, returning = write_down(a), write_down(b)
    a.send(*there)
    b.send(*back)
    await b.until(lambda: len(b.got) == len(there))
    await a.until(lambda: len(a.got) == len(back))
    check_order(there, b.got, leaving)
    check_order(back, a.got, returning)
    assert not a.lost
    assert not b.lost


@pytest.mark.parametrize("seed", range(10))
def test_wires_of_any_speed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In virtual time: each piece of each wire is late as it likes."""
    monkeypatch.setattr(link_module, "LOOK", 0.0)

    async def main() -> None:
        rng = random.Random(seed)
        net = striped("memory", rng.choice((1, 2, 5)))
        a, b = await grown(net)
        net.memory.delay = lambda source, target: rng.choice((0.0, 0.001, 0.1))
        net.memory.piece = lambda: rng.choice((100, 5000, 100_000))
        there = mixed(seed, 60)
        leaving = write_down(a)
        a.send(*there)
        await b.until(lambda: len(b.got) == len(there))
        check_order(there, b.got, leaving)
        await net.close()

    in_virtual_time(main())


async def test_stripes_are_added_while_frames_are_under_way(net: LinkNet) -> None:
    a, b = await net.pair()
    frames = [data(bytes([i]) * LARGE * 4, call=i) for i in range(100)]
    b.send(*frames)  # who has accepted asks the other one to dial
    await a.until(lambda: len(a.got) == len(frames))
    assert {h.call: payload for h, payload in a.got} == {f.header.call: bytes(f.payload or b"") for f in frames}
    await until_true(lambda: a.link and b.link and len(a.link._stripes) == len(b.link._stripes) >= 1)
    assert not a.lost


async def test_a_small_frame_does_not_wait_behind_large_ones(net: LinkNet) -> None:
    """The receiver sees a small frame that was sent last before large ones that nobody had room for."""
    a, b = await grown(net)
    a.send(*(data(bytes(MAX_PAYLOAD), call=i) for i in range(64)))
    a.send(data(b"small", call=64))
    await b.until(lambda: len(b.got) == 65)
    order = [h.call for h, _ in b.got]
    assert order.index(64) < 32


# --- memory -----------------------------------------------------------------------------------------------------------


async def test_an_abort_lets_go_of_frames_on_all_wires(net: LinkNet) -> None:
    a, b = await grown(net)
    memory = bytearray(b"x" * MAX_PAYLOAD)
    token = object()
    a.send(*(data(memory, call=k, token=token) for k in range(32)))
    out = {f.header.call for f in a.sent}
    assert a.link
    a.link.abort(token)
    a.outbox.clear()
    memory[:] = b"-" * len(memory)
    last = OutFrame(Header(Kind.DISCARDED, EPOCH, call=99), None, None)
    a.send(last)
    await b.until(lambda: b.got and b.got[-1][0] == last.header)
    good = {h.call: payload for h, payload in b.got[:-1] if payload is not None}
    assert set(good) == out
    assert all(payload == b"x" * MAX_PAYLOAD for payload in good.values())


async def test_a_frame_on_a_stripe_is_redirected(net: LinkNet) -> None:
    """Only that one: others go on to their places."""
    a, b = await grown(net)
    memory = {call: bytearray(MAX_PAYLOAD) for call in range(8)}
    begun: list[Header] = []

    def place(header: Header) -> memoryview:
        begun.append(header)
        if header.call == 3:
            asyncio.get_running_loop().call_soon(let_go, header)
        return memoryview(memory[header.call])

    def let_go(header: Header) -> None:
        if b.link and any(track.reader.present == header for track in b.link._tracks):
            b.link.redirect(header)
            memory[3][:] = b"-" * MAX_PAYLOAD

    b.place = place
    a.send(*(data(bytes([call]) * MAX_PAYLOAD, call=call) for call in range(8)))
    await b.until(lambda: len(b.got) == 8)
    for header, payload in b.got:
        assert payload is None or payload == bytes([header.call]) * MAX_PAYLOAD
    assert memory[3] in (b"-" * MAX_PAYLOAD, bytes([3]) * MAX_PAYLOAD)


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 3])
async def test_a_link_dies_with_any_of_its_wires(net: LinkNet, which: int) -> None:
    """In mid-frame, both ways: no half frame is taken for a whole one, each side hears of it once, and all wires are closed."""
    a, b = await grown(net)
    frames = [data(bytes([i]) * MAX_PAYLOAD, call=i) for i in range(64)]
    a.send(*frames)
    b.send(*frames)
    await b.wait("ended", 3)
    assert a.link
    assert b.link
    wire = a.link._tracks[which].wire
    net._wires.append(wire)
    if isinstance(wire, TcpWire):
        wire.shutdown()
        assert wire._sock
        wire._sock.shutdown(0)
    else:
        wire.reset_soon()  # type: ignore[attr-defined]
        wire.peer.reset_soon()  # type: ignore[attr-defined]
    for side in (a, b):
        await side.wait("lost")
        assert side.events[-1][0] == "lost"
        assert len(side.lost) == 1
        assert all(payload == bytes([h.call]) * MAX_PAYLOAD for h, payload in side.got if payload is not None)
    for link in (a.link, b.link):
        await link.wait_closed()
        assert all(track.fileno() == -1 for track in link._tracks)


async def test_what_was_sent_before_a_close_arrives_on_all_wires(net: LinkNet) -> None:
    """Whoever leaves has sent everything: its end on one wire does not cut off what is under way on another."""
    a, b = await grown(net)
    frames = [data(bytes([i]) * LARGE, call=i) for i in range(30)]
    a.send(*frames)
    await a.until(lambda: len(a.sent) == len(frames))
    assert a.link
    a.link.close()
    await b.wait("lost")
    assert {h.call: payload for h, payload in b.got} == {f.header.call: bytes(f.payload or b"") for f in frames}


def test_one_wire_that_ends_by_itself_is_the_end() -> None:
    """A box in between may close one connection and not the others."""

    async def main() -> None:
        net = striped("memory")
        a, b = await grown(net)
        assert b.link
        b.link._stripes[0].wire.shutdown()
        await a.wait("lost")
        await b.wait("lost")
        await net.close()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(link_module, "LOOK", 0.0)
        in_virtual_time(main())


# --- who may add a stripe ---------------------------------------------------------------------------------------------


async def test_a_stripe_proves_what_only_the_two_ends_know(net: LinkNet) -> None:
    endpoint = await net.listen()
    first = await net.stranger(endpoint)
    stripes = await offer_proof(first.wire, TICKET)
    b = await net.accepted()
    assert b.link
    number = stripes.admission
    for wrong in (
        stripes._replace(secret=TICKET.secret),
        stripes._replace(admission=number ^ 1),
        stripes._replace(dialer=TICKET.dialer + 1),
        stripes._replace(acceptor=TICKET.acceptor + 1),
    ):
        with pytest.raises(Refusal):
            await offer_proof((await net.stranger(endpoint)).wire, wrong, STRIPE_MAGIC)
    assert not b.link._stripes
    stripe = await net.stranger(endpoint)
    await offer_proof(stripe.wire, stripes, STRIPE_MAGIC)
    await until_true(lambda: b.link and len(b.link._stripes) == 1)
    await stripe.send(pack_header(Header(Kind.DATA, EPOCH, 1, length=5)), b"hello", SEAL_GOOD)
    await b.wait("ended")
    assert b.got == [(Header(Kind.DATA, EPOCH, 1, length=5), b"hello")]
    b.link.close()
    first.wire.close()
    stripe.wire.close()
    await b.link.wait_closed()
    with pytest.raises(Refusal):
        await offer_proof((await net.stranger(endpoint)).wire, stripes, STRIPE_MAGIC)


async def test_a_stripe_that_cannot_be_had_costs_nothing(net: LinkNet) -> None:
    a, b = await net.pair()
    net._transports[0]._numbers.clear()  # the acceptor knows of no link
    a.send(*(data(bytes(MAX_PAYLOAD), call=i) for i in range(8)))
    await b.wait("ended", 8)
    assert a.link
    await until_true(lambda: a.link and not a.link._dialling)
    assert not a.link._stripes
    assert not a.lost


# --- how many ---------------------------------------------------------------------------------------------------------


class Path:
    """Stripes that carry what they are said to."""

    def __init__(self, most: int = 16) -> None:
        self.growth = Growth(most)
        self.accounts: list[Account] = []

    def run(self, goodput: float, *, held_back: float = 0.0, rtt: float = 0.001) -> int:
        """Send for a while at a speed of all stripes together, in bytes per second; returns how many there are to be."""
        span = max(LEAST_SPAN, 10 * rtt)
        share = goodput * span / len(self.accounts)
        self.accounts = [Account(int(x.acked + share), x.busy + span, x.held_back + span * held_back, rtt) for x in self.accounts]
        return self.growth.look(self.accounts)

    def have(self, count: int) -> None:
        self.accounts += [Account(0, 0.0, 0.0, 0.001)] * (count - len(self.accounts))
        assert self.growth.look(self.accounts) == count


def test_stripes_double_while_that_is_worth_it() -> None:
    path = Path()
    path.have(1)
    assert path.run(100e6) == 2
    path.have(2)
    assert path.run(190e6) == 4
    path.have(4)
    assert path.run(200e6) == 4
    assert path.run(205e6) == 4


def test_there_are_never_more_stripes_than_allowed() -> None:
    path = Path(most=3)
    path.have(1)
    assert path.run(1e6) == 2
    path.have(2)
    assert path.run(2e6) == 3
    path.have(3)
    assert path.run(9e6) == 3


def test_a_receiver_that_is_the_limit_gets_no_more_stripes() -> None:
    path = Path()
    path.have(1)
    assert path.run(100e6, held_back=0.9) == 1
    assert path.run(100e6, held_back=0.0) == 1


def test_a_look_that_is_too_short_tells_nothing() -> None:
    path = Path()
    path.have(1)
    path.accounts = [Account(1 << 20, LEAST_SPAN / 2, 0.0, 0.001)]
    assert path.growth.look(path.accounts) == 1
    path.accounts = [Account(1 << 21, LEAST_SPAN * 2, 0.0, 1.0)]
    assert path.growth.look(path.accounts) == 1


def test_who_keeps_no_account_gets_all_stripes() -> None:
    assert Growth(5).look([None]) == 5
    assert Growth(5).begin(None) == 1


def test_a_far_path_begins_with_more_stripes() -> None:
    assert Growth(16).begin(Account(0, 0.0, 0.0, FAR / 2)) == 1
    assert Growth(16).begin(Account(0, 0.0, 0.0, FAR)) == FAR_START
    assert Growth(1).begin(Account(0, 0.0, 0.0, FAR)) == 1
    assert Growth(STRIPES).begin(Account(0, 0.0, 0.0, 1.0)) == FAR_START


def test_tickets_of_stripes_are_of_one_link_only() -> None:
    """The same two peers with the same secret: other nonces, another number and secret."""

    async def main() -> None:
        net = LinkNet(NETS["memory"])
        endpoint = await net.listen()
        found: list[LinkTicket] = []
        for _ in range(2):
            found.append(await offer_proof((await net.stranger(endpoint)).wire, TICKET))
            await net.accepted()
        assert found[0].admission != found[1].admission
        assert len({found[0].secret, found[1].secret, TICKET.secret}) == 3
        await net.close()

    in_virtual_time(main())
