"""A connected stream of bytes that does not block: what TCP and memory links are made on, and how two peers prove to each other that they
know an admission's secret before anything else is believed.

The proof: both sides send 16 random bytes, and each then shows HMAC-SHA256 over the whole exchange and its own role, keyed with the secret,
which itself never travels. A dialer speaks first, so that an idle stranger costs nothing but a deadline. From the same exchange both derive
the number and the secret by which more wires of this link, its stripes, are proved in the same way, also when the admission is long over.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pccl.transports.base import Admit, LinkTicket, Refusal

HELLO = struct.Struct("!8sHQII16s")
MAGIC = b"PCCLlink"
STRIPE_MAGIC = b"PCCLstrp"
VERSION = 2
NONCE_BYTES = 16
PROOF_BYTES = 32
WELCOME = b"ok"


class Account(NamedTuple):
    """What has become of the bytes that were written to a wire, in all so far."""

    acked: int
    """Bytes that the other host has acknowledged"""
    busy: float
    """Seconds in which there were some to be"""
    held_back: float
    """Seconds of these in which the receiver was what they waited for"""
    rtt: float
    """The round trip at present, in seconds"""


class Wire(ABC):
    """One end of a stream of bytes."""

    @property
    def stripes(self) -> int:
        """How many more of this kind at most are of use to a link."""
        return 0

    def account(self) -> Account | None:
        """Of what was written so far; None if nobody keeps one."""
        return None

    def fileno(self) -> int:
        """See `Link.fileno`."""
        return -1

    @abstractmethod
    def notify_readable(self, callback: Callable[[], None] | None) -> None:
        """Call this from the loop whenever `read` has something (again and again as long as it has); None to stop."""

    @abstractmethod
    def notify_writable(self, callback: Callable[[], None] | None) -> None:
        """Likewise, whenever `write` takes something."""

    @abstractmethod
    def read(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers in order with what is there; returns how many bytes, 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing is there now.
            OSError: the stream is broken.
        """

    @abstractmethod
    def write(self, buffers: Sequence[memoryview | bytes]) -> int:
        """Take as much of the buffers as fits; returns how many bytes.

        Raises:
            BlockingIOError: nothing fits now.
            OSError: the stream is broken.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Nothing more will be written: the other side reads the end of the stream after what is under way."""

    @abstractmethod
    def close(self) -> None:
        """The end; idempotent."""

    @abstractmethod
    def silent_for(self) -> float:
        """See `Link.silent_for`."""


async def offer_proof(wire: Wire, ticket: LinkTicket, magic: bytes = MAGIC) -> LinkTicket:
    """The dialer's side; returns the ticket for stripes.

    Args:
        magic: MAGIC for a link, STRIPE_MAGIC for a stripe of one.

    Raises:
        Refusal: the other side does not know the secret, or hung up.
    """
    hello = HELLO.pack(magic, VERSION, ticket.admission, ticket.dialer, ticket.acceptor, os.urandom(NONCE_BYTES))
    await write_all(wire, hello)
    reply = await read_exactly(wire, NONCE_BYTES + PROOF_BYTES)
    said = hello + reply[:NONCE_BYTES]
    if not hmac.compare_digest(reply[NONCE_BYTES:], _proof(ticket.secret, b"acceptor", said)):
        raise Refusal("the other side does not know the epoch's secret")
    await write_all(wire, _proof(ticket.secret, b"dialer", said))
    if await read_exactly(wire, len(WELCOME)) != WELCOME:
        raise Refusal("the other side did not accept the proof")
    return _stripe_ticket(ticket, said)


class Proved(NamedTuple):
    """What a dialer has shown."""

    magic: bytes
    ticket: LinkTicket
    stripes: LinkTicket
    """What its stripes will show"""


async def demand_proof(wire: Wire, admit: Mapping[bytes, Admit]) -> Proved:
    """The acceptor's side.

    Args:
        admit: by the magic of the hello.

    Raises:
        Refusal: the stranger is none of ours.
    """
    hello = await read_exactly(wire, HELLO.size)
    magic, version, admission, dialer, acceptor, _ = HELLO.unpack(hello)
    if magic not in admit or version != VERSION:
        raise Refusal("this is no pccl peer")
    ticket = await admit[magic](admission, dialer, acceptor)
    if ticket is None:
        raise Refusal(f"nobody expects peer {dialer} in admission {admission}")
    nonce = os.urandom(NONCE_BYTES)
    said = hello + nonce
    await write_all(wire, nonce + _proof(ticket.secret, b"acceptor", said))
    if not hmac.compare_digest(await read_exactly(wire, PROOF_BYTES), _proof(ticket.secret, b"dialer", said)):
        raise Refusal("wrong proof")
    await write_all(wire, WELCOME)
    return Proved(magic, ticket, _stripe_ticket(ticket, said))


def _stripe_ticket(ticket: LinkTicket, said: bytes) -> LinkTicket:
    """The number stands where the admission's does."""
    number = int.from_bytes(_proof(ticket.secret, b"number", said)[:8], "big")
    return LinkTicket(number, _proof(ticket.secret, b"stripes", said), ticket.dialer, ticket.acceptor)


def _proof(secret: bytes, role: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, role + said, hashlib.sha256)


async def read_exactly(wire: Wire, n: int) -> bytes:
    """Exactly n bytes.

    Raises:
        Refusal: the connection broke, or ended.
    """
    data = memoryview(bytearray(n))
    got = 0
    while got < n:
        try:
            more = wire.read([data[got:]])
        except BlockingIOError:
            await until(wire.notify_readable)
            continue
        except OSError as e:
            raise Refusal(f"the connection broke: {e}") from e
        if not more:
            raise Refusal("the other side hung up")
        got += more
    return bytes(data)


async def write_all(wire: Wire, data: bytes) -> None:
    """All of it.

    Raises:
        Refusal: the connection broke.
    """
    sent = 0
    while sent < len(data):
        try:
            sent += wire.write([data[sent:]])
        except BlockingIOError:
            await until(wire.notify_writable)
        except OSError as e:
            raise Refusal(f"the connection broke: {e}") from e


async def until(notify: Callable[[Callable[[], None] | None], None]) -> None:
    """Wait until the wire calls back."""
    event = asyncio.Event()
    notify(event.set)
    try:
        await event.wait()
    finally:
        notify(None)
