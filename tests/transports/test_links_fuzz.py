"""Whatever bytes a stranger sends in a handshake, and whatever a proved peer sends after it, the link is refused or lost, in time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from hypothesis import given
from hypothesis import strategies as st

from pccl.core.codec import WireError
from pccl.core.frames import SEAL_GOOD, Header, Kind, pack_header
from pccl.transports.base import Refusal
from pccl.transports.streams import PROOF_TIMEOUT
from pccl.transports.wire import HELLO, MAGIC, NONCE_BYTES, PROOF_BYTES, VERSION, WELCOME, _proof
from tests.support.links import EPOCH, NETS, TICKET, LinkNet, Stranger, data, in_virtual_time

HELLO_BYTES = HELLO.pack(MAGIC, VERSION, TICKET.admission, TICKET.dialer, TICKET.acceptor, b"n" * NONCE_BYTES)
changes = st.tuples(st.integers(0, 200), st.integers(0, 255), st.sampled_from(["set", "cut", "insert"]))
pieces = st.integers(1, 100)


def changed(raw: bytes, change: tuple[int, int, str]) -> bytes:
    """Never the same bytes, nor an extension of them."""
    at, value, how = change
    at %= len(raw)
    if how == "cut":
        return raw[:at]
    if how == "insert" and raw[at] != value:
        return raw[:at] + bytes([value]) + raw[at:]
    return raw[:at] + bytes([value if raw[at] != value else value ^ 1]) + raw[at + 1 :]


def tried(piece: int, main: Callable[[LinkNet], Awaitable[None]]) -> None:
    async def run() -> None:
        links = LinkNet(NETS["memory"])
        links.memory.piece = lambda: piece
        await main(links)
        await links.close()

    in_virtual_time(run())


async def refused(links: LinkNet, endpoint: str, stranger: Stranger, began: float) -> None:
    """It is sent away within the limit, and a real peer gets its link all the same."""
    await stranger.rest()
    assert asyncio.get_running_loop().time() - began <= PROOF_TIMEOUT + 0.01
    assert links.accepts == 0
    links.memory.piece = lambda: 1 << 16
    a, b = await links.dial(endpoint), await links.accepted()
    a.send(data(b"hello"))
    await b.wait("ended")


@given(st.binary(max_size=200), pieces)
def test_any_bytes_instead_of_a_hello(said: bytes, piece: int) -> None:
    async def main(links: LinkNet) -> None:
        began = asyncio.get_running_loop().time()
        endpoint = await links.listen()
        stranger = await links.stranger(endpoint)
        await stranger.send(said)
        await refused(links, endpoint, stranger, began)

    tried(piece, main)


@given(changes, pieces)
def test_any_change_to_a_hello(change: tuple[int, int, str], piece: int) -> None:
    """The proof is over every byte of it."""

    async def main(links: LinkNet) -> None:
        began = asyncio.get_running_loop().time()
        endpoint = await links.listen()
        stranger = await links.stranger(endpoint)
        await stranger.send(changed(HELLO_BYTES, change))
        reply = await stranger.receive(NONCE_BYTES + PROOF_BYTES)
        await stranger.send(_proof(TICKET.secret, b"dialer", HELLO_BYTES + reply[:NONCE_BYTES]))
        await refused(links, endpoint, stranger, began)

    tried(piece, main)


@given(changes, pieces)
def test_any_change_to_a_dialers_proof(change: tuple[int, int, str], piece: int) -> None:
    async def main(links: LinkNet) -> None:
        began = asyncio.get_running_loop().time()
        endpoint = await links.listen()
        stranger = await links.stranger(endpoint)
        await stranger.send(HELLO_BYTES)
        reply = await stranger.receive(NONCE_BYTES + PROOF_BYTES)
        await stranger.send(changed(_proof(TICKET.secret, b"dialer", HELLO_BYTES + reply[:NONCE_BYTES]), change))
        await refused(links, endpoint, stranger, began)

    tried(piece, main)


@given(changes, st.sampled_from(["reply", "welcome"]), pieces)
def test_any_change_to_an_acceptors_words(change: tuple[int, int, str], where: str, piece: int) -> None:
    async def main(links: LinkNet) -> None:
        house, visitor = await links.open_house()
        dialling = asyncio.create_task(links.dial(house, timeout=5.0))
        stranger = await visitor()
        said = await stranger.receive(HELLO.size)
        nonce = b"m" * NONCE_BYTES
        reply, welcome = nonce + _proof(TICKET.secret, b"acceptor", said + nonce), WELCOME
        if where == "reply":
            reply = changed(reply, change)
        else:
            welcome = changed(welcome, change)
        await stranger.send(reply, welcome)
        refusal = (await asyncio.gather(dialling, return_exceptions=True))[0]
        assert isinstance(refusal, Refusal)
        await stranger.rest()

    tried(piece, main)


frames = st.lists(
    st.builds(
        lambda kind, call, length: pack_header(Header(kind, EPOCH, call, length=length)) + (b"x" * length + SEAL_GOOD if length else b""),
        st.just(int(Kind.DATA)),
        st.integers(0, 1 << 63),
        st.integers(0, 300),
    ),
    max_size=5,
)


@given(frames, st.binary(max_size=300), pieces)
def test_any_bytes_behind_frames(said: list[bytes], noise: bytes, piece: int) -> None:
    """The frames come; then the link is lost, be it that the noise is none or that it just ends."""

    async def main(links: LinkNet) -> None:
        b, peer = await links.insider()
        await peer.send(*said, noise)
        peer.wire.shutdown()
        await b.wait("lost")
        assert len(b.got) == len(said)
        assert isinstance(b.lost[0], (WireError, ConnectionResetError))

    tried(piece, main)
