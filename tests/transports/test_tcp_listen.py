"""Where TCP links are listened for, and what others are told of it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pccl.connection import default_advertise
from pccl.core.address import Address
from pccl.core.frames import Header
from pccl.transports.base import Link, LinkHandler, LinkTicket, OutFrame
from pccl.transports.tcp import TcpTransport

TICKET = LinkTicket(1, b"s" * 32, 1, 0)


class Idle(LinkHandler):
    """Sends nothing, expects nothing."""

    def next_frame(self, link: Link, *, small: bool = True, large: bool = True) -> OutFrame | None:
        return None

    def frame_sent(self, link: Link, frame: OutFrame) -> None:
        raise AssertionError

    def frame_begun(self, link: Link, header: Header) -> memoryview | None:
        raise AssertionError

    def frame_ended(self, link: Link, header: Header, good: bool) -> None:
        raise AssertionError

    def link_lost(self, link: Link, error: Exception) -> None:
        pass


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
async def test_every_interface_means_both_families() -> None:
    accepted: asyncio.Queue[Link] = asyncio.Queue()

    async def admit(admission: int, dialer: int, acceptor: int) -> LinkTicket:
        return TICKET

    def accept(link: Link) -> LinkHandler:
        accepted.put_nowait(link)
        return Idle()

    here, there = TcpTransport(""), TcpTransport("127.0.0.1")
    (endpoint,) = await here.listen(admit, accept)
    port = endpoint.rpartition(":")[2]
    try:
        for host in ("127.0.0.1", "[::1]"):
            link = await there.dial((f"{host}:{port}",), TICKET, Idle(), 10.0)
            (await accepted.get()).close()
            link.close()
    finally:
        await there.close()
        await here.close()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_wildcard_is_never_what_others_dial(host: str) -> None:
    assert default_advertise(Address("127.0.0.1", 1), (host, 4000)) == ("127.0.0.1", 4000)


def test_an_address_is() -> None:
    assert default_advertise(Address("127.0.0.1", 1), ("192.0.2.7", None)) is None


async def test_plain_payloads_off_loopback_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    transport = TcpTransport()
    for host in ("127.0.0.1", "::1", "192.0.2.7", "192.0.2.8", "192.0.2.7"):
        transport._warn(host)
    assert [r.getMessage() for r in caplog.records] == ["payloads to and from 192.0.2.7 are not encrypted: use a private network or a VPN"]
